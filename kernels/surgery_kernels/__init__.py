"""Flash attention that also returns differentiable per-head attention statistics.

Importing this package needs torch only; triton and compiled extensions are loaded by the backend that needs them.
"""

from .api import flash_attn_stats, flash_attn_stats_varlen, make_inputs
from .backends import BACKENDS, backend_order, backend_reasons, choose_backend
from .column_mass import column_mass
from .ops import attn_backward, attn_forward
from .stats import STATS
from .types import AttnInputs, AttnOutput, Backend, Stat

__all__ = [
    "BACKENDS",
    "STATS",
    "AttnInputs",
    "AttnOutput",
    "Backend",
    "Stat",
    "attn_backward",
    "attn_forward",
    "backend_order",
    "backend_reasons",
    "choose_backend",
    "column_mass",
    "flash_attn_stats",
    "flash_attn_stats_varlen",
    "make_inputs",
]
