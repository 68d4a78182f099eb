"""Surgery (arXiv 2602.05228) for Hugging Face models, on flash attention that returns sink statistics.

Importing the package registers the attention implementation `surgery` with transformers.
"""

from .attention import register
from .config import SurgeryConfig
from .families import FAMILIES
from .patch import AutoSurgeryModelForCausalLM, patch_model, patched, unpatch_model
from .regularizer import PenaltyReport, SurgeryRegularizer
from .statistics import find_sinks, sink_divergence, sink_mass

register()

_LAZY = {"SurgeryCallback": "callback", "SurgeryTrainer": "trainer", "SurgerySFTTrainer": "trainer_sft"}

__all__ = [
    "FAMILIES",
    "AutoSurgeryModelForCausalLM",
    "PenaltyReport",
    "SurgeryConfig",
    "SurgeryRegularizer",
    "find_sinks",
    "patch_model",
    "patched",
    "sink_divergence",
    "sink_mass",
    "unpatch_model",
    *_LAZY,
]


def __getattr__(name):
    # Trainer, and more so TRL, take seconds to import
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
