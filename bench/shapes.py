"""What is measured: the attention of one layer of known models, at a length, batch size, kind and dtype."""

from dataclasses import dataclass

import torch

KINDS = ("causal", "full", "window", "packed", "padded")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# matrix products of the pass over those of the forward, the field's convention: S and PV; S, dP, dV, dK, dQ
FLOPS = {"forward": 1.0, "backward": 2.5, "both": 3.5}
# real tokens of the sequences of a ragged batch, in quarters of the length, in turn
_QUARTERS = (4, 2, 3, 1)


@dataclass(frozen=True)
class Shape:
    """Attention heads of one layer; `window` is the number of keys that a row sees, itself included, or None."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None


# public config.json numbers of each model
SHAPES = {
    "llama3-8b": Shape(32, 8, 128),
    "llama3.2-1b": Shape(32, 8, 64),
    "qwen2.5-7b": Shape(28, 4, 128),
    "qwen3-8b": Shape(32, 8, 128),
    "mistral-7b": Shape(32, 8, 128, window=4096),
    "smollm2-135m": Shape(9, 3, 64),
    # for the tests of these tools
    "tiny": Shape(4, 2, 16, window=24),
}


@dataclass(frozen=True)
class Case:
    """One problem: self-attention of `batch` sequences of at most `length` tokens.

    Kinds: causal, full (no mask), window (causal, the shape's sliding window), packed and padded (causal, sequences
    of 1, 1/2, 3/4 and 1/4 of the length in turn; packed into one row of tokens, or padded on the right).

    Raises:
        ValueError: unknown names, sizes below 1, a window kind for a shape without one.
    """

    shape: str
    length: int
    batch: int = 1
    kind: str = "causal"
    dtype: str = "bfloat16"

    def __post_init__(self):
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("kind", self.kind, KINDS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        for name, value in (("length", self.length), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.kind == "window" and self.heads.window is None:
            raise ValueError(f"shape {self.shape!r} has no window; shapes with one: {_windowed()}")

    @property
    def heads(self):
        return SHAPES[self.shape]

    @property
    def torch_dtype(self):
        return DTYPES[self.dtype]

    @property
    def causal(self):
        return self.kind != "full"

    @property
    def left(self):
        """Keys that a row sees to its left, -1 for all."""
        return self.heads.window - 1 if self.kind == "window" else -1

    @property
    def softmax_scale(self):
        return self.heads.head_dim**-0.5

    @property
    def lengths(self):
        """Real tokens of each sequence."""
        if self.kind not in ("packed", "padded"):
            return (self.length,) * self.batch
        return tuple(max(1, self.length * _QUARTERS[b % 4] // 4) for b in range(self.batch))

    @property
    def starts(self):
        """Where each sequence starts in a packed row, and the total."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    def pairs(self):
        """Visible (row, key) pairs of one head, all sequences."""
        return sum(_pairs(length, self.causal, self.left) for length in self.lengths)

    def flops(self, mode):
        """Useful floating-point operations of a mode: 4 D a visible pair and head in the forward, 2.5 times that in
        the backward, whatever an implementation really does."""
        return 4 * self.heads.heads * self.heads.head_dim * self.pairs() * FLOPS[mode]


def _pairs(length, causal, left):
    if not causal:
        return length * length
    full = length * (length + 1) // 2
    hidden = max(0, length - left - 1) if left >= 0 else 0
    return full - hidden * (hidden + 1) // 2


def _windowed():
    return ", ".join(name for name, shape in SHAPES.items() if shape.window is not None)


def case_for(shape, length, tokens=None, batch=1, kind="causal", dtype="bfloat16"):
    """A Case with `batch` sequences, or as many as make `tokens` tokens in all (at least one)."""
    return Case(shape, length, max(1, tokens // length) if tokens else batch, kind, dtype)
