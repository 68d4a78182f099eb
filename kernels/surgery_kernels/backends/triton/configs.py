"""Tile sizes as data: one table an architecture, one row a kernel and head dim. No triton here."""

from dataclasses import dataclass

KERNELS = ("fwd", "dkdv", "dq")
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class TileConfig:
    """Tiles of block_m query rows and block_n keys, warps of a program, stages of its software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETER = TileConfig(32, 16, 4, 1)


def chunks(head_dim):
    """Two powers of two >= 16 (or one and 0), of the smallest sum that holds head_dim: 80 -> (64, 16)."""
    best = None
    for d0 in (16, 32, 64, 128, 256):
        for d1 in (0, 16, 32, 64, 128):
            # the larger chunk first; of equal sums the one in a single piece
            if d1 < d0 and d0 + d1 >= head_dim and (best is None or d0 + d1 < sum(best)):
                best = (d0, d1)
    if best is None:
        raise ValueError(f"head_dim must be in [1, {MAX_HEAD_DIM}], got {head_dim}")
    return best


def choose(kernel, capability, head_dim, itemsize):
    return [INTERPRETER]
