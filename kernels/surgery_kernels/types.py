"""The words every module of the package uses.

Shapes: B sequences, T query or key length, H query heads, H_kv key heads, D head dim, S statistics. `rows` is
short for one number a query row and head: [B, H, Tq] dense, [H, total_q] packed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class AttnOutput(NamedTuple):
    """What `flash_attn_stats` returns.

    Attributes:
        out: [B, Tq, H, D] (packed: [total_q, H, D]), the dtype of q.
        lse: [B, H, Tq] (packed: [H, total_q]) fp32, natural log-sum-exp of the scores, differentiable. -inf for a
            row that sees no key. fp64 for fp64 inputs.
        stats: name -> rows shaped as lse, differentiable; 0 for a row that sees no key.
    """

    out: Tensor
    lse: Tensor
    stats: dict[str, Tensor]


@dataclass(frozen=True)
class AttnInputs:
    """One attention problem with every default filled in: what a backend gets.

    Dense: q [B, Tq, H, D], k and v [B, Tk, H_kv, D]. Packed (`cu_seqlens_q` given): q [total_q, H, D], k and v
    [total_k, H_kv, D]. Sink keys are the first `n_sinks` real keys of each sequence, or `sinks` [B, n] int32,
    positions counted from each sequence's first real key; the same position twice counts once.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    stats: tuple[str, ...] = ("sink_mass",)
    n_sinks: int = 1
    sinks: Tensor | None = None
    leftpad_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    @property
    def is_varlen(self):
        return self.cu_seqlens_q is not None

    @property
    def rows_shape(self):
        """Shape of lse and of one statistic."""
        if self.is_varlen:
            return (self.q.shape[1], self.q.shape[0])
        return (self.q.shape[0], self.q.shape[2], self.q.shape[1])

    @property
    def rows_dtype(self):
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def window_bounds(self):
        """(left, right) with causal folded into right; -1 is unbounded."""
        left, right = self.window_size
        return (left, 0 if self.causal else right)

    def unpack(self):
        """Yield (rows of q, rows of k, dense inputs of batch size 1) for each non-empty packed sequence."""
        starts_q, starts_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        for i in range(len(starts_q) - 1):
            of_q, of_k = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
            if of_q.start == of_q.stop:
                continue
            yield (
                of_q,
                of_k,
                replace(
                    self,
                    q=self.q[of_q].unsqueeze(0),
                    k=self.k[of_k].unsqueeze(0),
                    v=self.v[of_k].unsqueeze(0),
                    sinks=None if self.sinks is None else self.sinks[i : i + 1],
                    cu_seqlens_q=None,
                    cu_seqlens_k=None,
                    max_seqlen_q=of_q.stop - of_q.start,
                    max_seqlen_k=of_k.stop - of_k.start,
                ),
            )


@dataclass(frozen=True)
class Stat:
    """A row statistic of attention: its definition and its three terms of the backward pass.

    With g = dL/d statistic, every statistic fits  ds = p * (dp + dp_stat - delta - ddelta_stat) + ds_stat.

    Attributes:
        name: key in STATS and in AttnOutput.stats.
        description: one line with unit.
        value: (s, p, lse, is_sink) -> rows. s [..., Tk] are scaled, softcapped scores, -inf where invisible.
        dp: (g, s, lse, is_sink) -> term added to dp, or None when the statistic has none.
        ddelta: (g, value) -> term added to delta, or None.
        ds: (g, s, value) -> term added to ds, or None.
    """

    name: str
    description: str
    value: Callable
    dp: Callable | None = None
    ddelta: Callable | None = None
    ds: Callable | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: key in BACKENDS.
        description: one line: where it runs and when to take it.
        unsupported_reasons: AttnInputs -> reasons why it cannot run this problem; an empty list means it can.
        forward: AttnInputs -> (out, lse, stats [S, *rows]).
        backward: (AttnInputs, out, lse, stats, dout, dlse, dstats) -> (dq, dk, dv); each of the three incoming
            gradients may be None.
    """

    name: str
    description: str
    unsupported_reasons: Callable
    forward: Callable
    backward: Callable
