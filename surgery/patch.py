"""Switch a model's attention to `surgery` and back."""

from contextlib import contextmanager
from dataclasses import dataclass

import surgery_kernels as sk
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import NAME, surgery_attention
from .families import FAMILIES
from .probe import unwrap

# attribute of a model whose probes are split over ranks, see context_parallel.py
SPLIT = "_surgery_split"


@dataclass(frozen=True)
class PatchState:
    """What `unpatch_model` needs: the attention implementation before the patch."""

    previous: str


def patch_model(model, backend="auto"):
    """Make every attention layer of `model` run on surgery_kernels. Returns the same model.

    Args:
        model: a causal language model of a family in FAMILIES; may be wrapped (DDP, PEFT, torch.compile, FSDP2).
        backend: a key of surgery_kernels.BACKENDS, or "auto".
    Raises:
        ValueError: unknown family or backend, nn.DataParallel, attention dropout, or the model refuses.
    """
    base = unwrap(model)
    _check_family(base)
    if backend != "auto" and backend not in sk.BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: 'auto', {', '.join(map(repr, sk.BACKENDS))}")
    modules = attention_modules(base)
    previous = base.config._attn_implementation
    if previous != NAME:
        base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:
        raise ValueError(f"{type(base).__name__} does not take a custom attention implementation")
    if getattr(base, "_surgery_patch", None) is None:
        # a model loaded with attn_implementation="surgery" has no earlier implementation to go back to
        base._surgery_patch = PatchState("sdpa" if previous == NAME else previous)
    for module in modules:
        module._surgery_backend = backend
    return model


def unpatch_model(model):
    """Undo `patch_model`. Returns the same model.

    Raises:
        ValueError: the model is not patched.
    """
    base = unwrap(model)
    state = getattr(base, "_surgery_patch", None)
    if state is None:
        raise ValueError(f"{type(base).__name__} is not patched: call patch_model first")
    base.set_attn_implementation(state.previous)
    base._surgery_patch = None
    for module in attention_modules(base):
        del module._surgery_backend
    return model


@contextmanager
def patched(model, backend="auto"):
    """`patch_model` inside a with block; a model that was patched before stays so afterwards."""
    was_patched = getattr(unwrap(model), "_surgery_patch", None) is not None
    patch_model(model, backend)
    try:
        yield model
    finally:
        if not was_patched:
            unpatch_model(model)


class AutoSurgeryModelForCausalLM:
    """`AutoModelForCausalLM.from_pretrained` for a model that is patched from the start."""

    @staticmethod
    def from_pretrained(*args, backend="auto", **kwargs):
        """Load and patch. Arguments of AutoModelForCausalLM.from_pretrained, and `backend` as in `patch_model`.

        Raises:
            ValueError: attn_implementation is given and is not "surgery"; as `patch_model`.
        """
        if kwargs.setdefault("attn_implementation", NAME) != NAME:
            raise ValueError(f"attn_implementation must be {NAME!r} here, got {kwargs['attn_implementation']!r}")
        return patch_model(AutoModelForCausalLM.from_pretrained(*args, **kwargs), backend)


def attention_modules(base):
    """The attention modules of an unwrapped model, by layer.

    Raises:
        ValueError: their `layer_idx` do not count 0, 1, 2, ...
    """
    modules = [m for m in base.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]
    modules.sort(key=lambda m: m.layer_idx)
    if not modules or [m.layer_idx for m in modules] != list(range(len(modules))):
        indices = [m.layer_idx for m in modules]
        raise ValueError(
            f"{type(base).__name__}: attention layers must be numbered 0, 1, 2, ..., got {indices}. A stage of a "
            f"pipeline holds only some of them: pipeline parallelism is not supported"
        )
    return modules


def check_patched(model):
    """Check that `model`'s attention is ours right now; returns the unwrapped model.

    Raises:
        ValueError: not patched, replaced after patching, an unknown family, attention dropout, nn.DataParallel.
    """
    base = unwrap(model)
    _check_family(base)
    implementation = base.config._attn_implementation
    if implementation != NAME:
        was = "was replaced after patch_model" if getattr(base, "_surgery_patch", None) else "is not patched"
        raise ValueError(f"the model's attention is {implementation!r}: it {was}. Call surgery.patch_model(model)")
    if ALL_ATTENTION_FUNCTIONS[NAME] is not surgery_attention:
        raise ValueError(f"another attention function was registered under the name {NAME!r}")
    return base


def _check_family(base):
    config = getattr(base, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(f"unknown model family {model_type!r}; known: {', '.join(sorted(FAMILIES))}")
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"config.attention_dropout must be 0, got {dropout}: dropout would make the statistics a lottery"
        )
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"a causal language model is needed, got {type(base).__name__} without output embeddings (a stage of a "
            f"pipeline has none: pipeline parallelism is not supported)"
        )
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise ValueError(f"causal attention is needed, and the config of {type(base).__name__} asks for bidirectional")
