"""Which backend to try first: a pure function of the problem and a small table of speeds.

The table is choice.csv: fp16/bf16 causal training with sink mass, TFLOP/s of forward and backward together, one row a
compute capability, backend, head dim and length. `python -m bench.choice` makes it again on any GPU, and
SURGERY_CHOICE_TABLE names a file to read instead. `source` says where a row is from; the committed ones are estimates.
"""

import csv
import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("choice.csv")
FIELDS = ("capability", "backend", "head_dim", "length", "tflops", "source")
# the order where the table has no row: what never needs another package before what does
DEFAULT = ("cpu", "triton", "fa4", "cudnn", "flash", "reference")
# materialises the score matrix
LAST = "reference"


class Speed(NamedTuple):
    """One row of the table."""

    capability: str
    backend: str
    head_dim: int
    length: int
    tflops: float
    source: str


@functools.cache
def read_table(path):
    """The rows of a CSV as a tuple of Speed.

    Raises:
        ValueError: other columns, or a number that is none.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path} must have the columns {FIELDS}, got {tuple(reader.fieldnames or ())}")
        rows = []
        for row in reader:
            try:
                numbers = int(row["head_dim"]), int(row["length"]), float(row["tflops"])
            except (TypeError, ValueError):
                raise ValueError(f"{path} must hold numbers in head_dim, length and tflops, got {row}") from None
            rows.append(Speed(row["capability"], row["backend"], *numbers, row["source"]))
    return tuple(rows)


def current_table():
    """The rows in use: of SURGERY_CHOICE_TABLE, or the committed ones."""
    return read_table(os.environ.get("SURGERY_CHOICE_TABLE") or TABLE)


def order(capability, head_dim, length, table=None):
    """The backends from the fastest down.

    Args:
        capability: (major, minor) of the CUDA device, or None for another device.
        head_dim, length: of the problem; the nearest row of the table counts.
        table: rows, default `current_table()`.
    Returns:
        dict name -> why it has this place; every backend is in it, `reference` last.
    """
    table = current_table() if table is None else table
    nearest = {} if capability is None else _nearest(table, capability, head_dim, length)
    fastest = sorted(nearest, key=lambda name: -nearest[name].tflops)
    why = {
        name: f"{nearest[name].tflops:.0f} TFLOP/s at head_dim {nearest[name].head_dim}, length "
        f"{nearest[name].length} on {nearest[name].capability} ({nearest[name].source})"
        for name in fastest
    }
    for name in DEFAULT:
        why.setdefault(name, _without_row(name, capability))
    return {name: why[name] for name in sorted(why, key=lambda name: name == LAST)}


def _without_row(name, capability):
    if name == LAST:
        return "materialises the score matrix: last"
    if capability is None:
        return "default order"
    return f"default order, no speed known on {capability[0]}.{capability[1]}"


def _nearest(table, capability, head_dim, length):
    """Backend -> its row that is nearest to the problem, of this capability or else of its major version.

    A row says nothing of much shorter problems, which no kernel computes as fast.
    """
    exact, major = "{}.{}".format(*capability), f"{capability[0]}."
    found = {}
    near = [row for row in table if row.length <= 2 * length]
    for name in {row.backend for row in near}:
        rows = [row for row in near if row.backend == name and row.capability == exact]
        rows = rows or [row for row in near if row.backend == name and row.capability.startswith(major)]
        if rows:
            found[name] = min(rows, key=lambda row: _distance(row, head_dim, length))
    return found


def _distance(row, head_dim, length):
    far = abs(math.log(row.head_dim / head_dim)), abs(math.log(row.length / max(length, 1)))
    # the head dim first; of two rows as near, the shorter: it claims less
    return (*far, row.length)
