"""The implementations that bench measures, one table. A new one is one entry in the file of its family.

The task `attention`: from q, k, v to out and the sink mass of each sequence's first key, and from their upstream
gradients to dq, dk, dv. The task `column_mass`: the attention that each key receives, no gradient.
"""

from . import columns, eager, flash_attention, flex, ours, sdpa, v_augmentation
from .types import Implementation

FAMILIES = (ours, eager, sdpa, flex, flash_attention, v_augmentation, columns)
IMPLEMENTATIONS = {entry.name: entry for family in FAMILIES for entry in family.ENTRIES}

__all__ = ["IMPLEMENTATIONS", "Implementation"]
