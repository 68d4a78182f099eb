"""Tile sizes as data: one table an architecture, one row a kernel and head dim. No triton here.

The rows are what `python -m bench.aot` compiles: no register spills up to head dim 128, and shared memory within
the architecture's limit. Nothing here has been timed on a GPU.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

# "bwd" is the single-pass backward
KERNELS = ("fwd", "dkdv", "dq", "bwd")
MAX_HEAD_DIM = 256
# a single pass holds all of k, v, dk, dv at once: it spills above
MAX_SINGLE_PASS = 128


@dataclass(frozen=True)
class TileConfig:
    """Tiles of block_m query rows and block_n keys, warps of a program, stages of its software pipeline; the most
    registers that a thread may get (0: as many as ptxas likes), and ptxas's --register-usage-level (5 is its own)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 0
    register_usage: int = 5


def _rows(**kernels):
    """{kernel: {largest head dim: TileConfig}}; a row reads "block_m block_n num_warps num_stages"."""
    return {
        kernel: {head_dim: TileConfig(*map(int, row.split())) for head_dim, row in table.items()}
        for kernel, table in kernels.items()
    }


TABLES = {
    # 163 KiB of shared memory, mma.sync
    80: _rows(
        fwd={
            64: "128 64 4 3",
            80: "128 32 8 3",
            96: "128 64 8 3",
            128: "128 32 8 3",
            192: "128 32 8 2",
            256: "64 64 8 2",
        },
        dkdv={64: "32 128 8 2", 96: "32 64 8 2", 128: "64 64 8 2", 256: "32 32 8 2"},
        dq={
            32: "64 64 4 2",
            64: "128 64 8 2",
            80: "64 64 8 2",
            96: "128 32 8 2",
            128: "64 64 8 2",
            192: "32 32 8 2",
            256: "64 32 8 2",
        },
        bwd={64: "32 128 8 2", 96: "64 64 8 2", 128: "16 64 8 2"},
    ),
    # sm_86, 89 and 12x: mma.sync with 99 KiB
    86: _rows(
        fwd={
            64: "128 64 4 3",
            80: "128 64 8 2",
            96: "128 64 8 3",
            128: "128 32 8 3",
            192: "128 32 8 2",
            256: "64 32 4 2",
        },
        dkdv={64: "32 128 8 2", 96: "32 64 8 2", 128: "64 64 8 2", 256: "32 32 8 2"},
        dq={32: "64 64 4 2", 64: "128 64 8 2", 128: "128 32 8 2", 256: "32 32 8 2"},
        bwd={64: "32 128 8 2", 96: "64 64 8 2", 128: "16 64 8 2"},
    ),
    # 227 KiB, wgmma
    90: _rows(
        fwd={64: "128 128 8 3", 128: "128 64 8 3", 256: "128 64 8 2"},
        dkdv={80: "64 128 8 2", 96: "32 128 8 3", 128: "64 128 8 3", 256: "32 64 8 2"},
        dq={32: "64 64 8 3", 128: "128 64 8 3", 256: "128 32 8 2"},
        bwd={64: "64 128 8 2", 128: "64 64 8 2"},
    ),
    # 227 KiB, tcgen05
    100: _rows(
        fwd={
            32: "128 64 4 3",
            64: "128 128 8 3",
            128: "128 64 8 3",
            192: "128 64 8 2",
            256: "128 32 8 2",
        },
        dkdv={64: "64 128 8 3", 96: "64 64 8 3", 128: "64 128 8 3", 192: "64 64 8 2", 256: "32 64 8 2"},
        dq={32: "128 64 8 3", 64: "64 64 8 3", 80: "128 64 4 4", 128: "128 64 4 3", 256: "64 64 8 2"},
        bwd={64: "64 128 8 2", 128: "64 64 8 2"},
    ),
}
# true fp32 products run on the ordinary cores: small tiles, every architecture
FP32 = _rows(
    fwd={128: "32 32 8 1", 256: "16 16 8 1"},
    dkdv={64: "32 32 4 1", 128: "16 32 4 1", 256: "16 16 4 1"},
    dq={64: "32 16 4 1", 256: "16 16 8 1"},
    bwd={64: "32 32 4 1", 128: "16 32 4 1"},
)
# taken when the self-check rejects the first choice: unpipelined, the smallest last; by bytes of an element
FALLBACKS = {
    2: (TileConfig(64, 32, 4, 1), TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1)),
    4: (TileConfig(16, 16, 8, 1), TileConfig(16, 16, 4, 1)),
}
# {architecture: head dims at which a measurement showed the single-pass backward to win, 16-bit inputs}; none was made
SINGLE_PASS = {}
INTERPRETER = TileConfig(32, 16, 4, 1)


def chunks(head_dim):
    """Two powers of two >= 16 (or one and 0), of the smallest sum that holds head_dim: 80 -> (64, 16)."""
    sizes = [(d0, d1) for d0 in (16, 32, 64, 128, 256) for d1 in (0, 16, 32, 64, 128) if d1 < d0]
    fitting = [size for size in sizes if head_dim <= sum(size) <= MAX_HEAD_DIM]
    if not fitting:
        raise ValueError(f"head_dim must be in [1, {MAX_HEAD_DIM}], got {head_dim}")
    # of equal sums the one in a single piece
    return min(fitting, key=lambda size: (sum(size), size[1]))


def arch_of(capability):
    """The table of a compute capability (major, minor)."""
    major, minor = capability
    if major in (10, 11):
        return 100
    if major == 9:
        return 90
    return 80 if (major, minor) == (8, 0) else 86


def single_pass_wins(capability, head_dim, itemsize):
    """Whether the single-pass backward is the default for a compute capability and head dim."""
    return itemsize == 2 and head_dim in SINGLE_PASS.get(arch_of(capability), ())


def tile_key(capability, kernel, head_dim, itemsize):
    """Name of a row in the file of SURGERY_TILES."""
    return f"sm_{capability[0]}{capability[1]} {kernel} head_dim {head_dim} bytes {itemsize}"


@functools.lru_cache
def read_tiles(path):
    """The rows that tune.py wrote: {tile_key: TileConfig}.

    Raises:
        ValueError: the file is missing, is not JSON, or a row is not "block_m block_n num_warps num_stages", with or
            without a fifth and a sixth number, max_registers and register_usage.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return {key: TileConfig(*map(int, row.split())) for key, row in rows.items()}
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"SURGERY_TILES must name a file of surgery_kernels.backends.triton.tune, got {path}: {error}"
        ) from error


def choose(kernel, capability, head_dim, itemsize, tuned=None, ptxas=None):
    """Configurations to try, best first.

    Args:
        kernel: one of KERNELS.
        capability: (major, minor), or None in the interpreter.
        head_dim: in [1, MAX_HEAD_DIM], for "bwd" in [1, MAX_SINGLE_PASS].
        itemsize: bytes of an element of q.
        tuned: rows of `read_tiles`, which come first.
        ptxas: fields of the built-in row, see ptxas.py; the row comes without them, too.
    Returns:
        tuple of TileConfig.
    """
    if capability is None:
        return (INTERPRETER,)
    table = (FP32 if itemsize == 4 else TABLES[arch_of(capability)])[kernel]
    first = table[min(dim for dim in table if dim >= sum(chunks(head_dim)))]
    own = (tuned or {}).get(tile_key(capability, kernel, head_dim, itemsize))
    choices = (own, replace(first, **(ptxas or {})), first, *FALLBACKS[itemsize])
    return tuple(dict.fromkeys(choice for choice in choices if choice))
