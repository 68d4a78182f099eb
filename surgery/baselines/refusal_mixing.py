"""Refusals mixed into the task rows (SafeInstr): Bianchi et al. 2023, arXiv 2309.07875, adds about 3 %."""

import random

from ..data import read_rows
from .defence import Defence


def check(train):
    """Raise ValueError for a ratio outside its range."""
    if not 0 < train.mixing_ratio <= 1:
        raise ValueError(f"mixing_ratio must be in (0, 1], got {train.mixing_ratio}")


def task_rows(train, rows):
    """int(mixing_ratio * n) rows of --refusal among the n task rows, in the order of `run_seed`.

    Raises:
        ValueError: --refusal has too few rows, or the ratio asks for none.
    """
    count, refusals = int(train.mixing_ratio * len(rows)), read_rows(train.refusal)
    if not count:
        raise ValueError(f"mixing_ratio {train.mixing_ratio} of {len(rows)} task rows is no refusal at all")
    if len(refusals) < count:
        raise ValueError(
            f"--refusal has {len(refusals)} rows, {count} are needed for mixing_ratio {train.mixing_ratio} of "
            f"{len(rows)} task rows"
        )
    mixed = rows + refusals[:count]
    random.Random(train.run_seed).shuffle(mixed)
    return mixed


REFUSAL_MIXING = Defence(options=("mixing_ratio",), check=check, task_rows=task_rows)
