"""AttnInputs as a vendor's kernel takes them: dense, or packed sequences; with or without the sink keys.

A packed kernel knows no padding, but a sequence may have no rows or no keys. So padding needs no copy: per sequence
there are (no rows, padded keys), (the rows, their keys), (padded rows, no keys). A sink key at the front of its
sequence is hidden from a kernel in the same way, and the rest stays aligned at the bottom right. All on the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import bounds_of


@dataclass(frozen=True)
class Problem:
    """What a vendor's kernel is asked for.

    Attributes:
        q, k, v: dense [B, T, H, D] or, with cu_q and cu_k [N + 1] int32, packed [total, H, D].
        max_q, max_k: the longest sequence.
        causal: nothing but causal; `window` (left, right) holds it too, as right = 0.
        first_row, first_key: dense rows and keys of the inputs that are left out at the front.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    scale: float
    causal: bool
    window: tuple[int, int]
    softcap: float
    first_row: int = 0
    first_key: int = 0

    @property
    def empty(self):
        return self.q.numel() == 0 or self.k.numel() == 0


def is_padded(inputs):
    return any(x is not None for x in (inputs.leftpad_k, inputs.seqused_q, inputs.seqused_k))


def problem_of(inputs, hide_sinks=False, top_left=False):
    """The Problem of `inputs`.

    Args:
        hide_sinks: leave out the first n_sinks keys of each sequence.
        top_left: the kernel aligns `causal` at the top left; then rows go with the keys, and padding is refused.
    """
    window = inputs.window_bounds
    q, k, v = inputs.q, inputs.k, inputs.v
    cu_q, cu_k = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    first_row = first_key = 0
    if inputs.is_varlen:
        if hide_sinks:
            cu_q, cu_k = _sinks_apart(cu_q, cu_k, inputs.n_sinks)
    elif is_padded(inputs):
        assert not top_left
        cu_q, cu_k = _padding_apart(inputs, inputs.n_sinks if hide_sinks else 0)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    elif hide_sinks:
        first_key = min(inputs.n_sinks, k.shape[1])
        k, v = k[:, first_key:], v[:, first_key:]
        if top_left and inputs.causal:
            first_row = min(first_key, q.shape[1])
            q = q[:, first_row:]
    return Problem(
        q,
        k,
        v,
        cu_q,
        cu_k,
        inputs.max_seqlen_q - first_row,
        inputs.max_seqlen_k - first_key,
        inputs.softmax_scale,
        window == (-1, 0),
        window,
        inputs.softcap,
        first_row,
        first_key,
    )


def _join(starts, total):
    """[N, parts] int64 starts and the total, as one int32 cu_seqlens."""
    return torch.cat([starts.flatten(), starts.new_full((1,), total)]).int()


def _sinks_apart(cu_q, cu_k, n_sinks):
    starts, ends = cu_k[:-1], cu_k[1:]
    doubled = torch.stack([cu_q[:-1], cu_q[:-1]], 1)
    keys = torch.stack([starts, torch.minimum(starts + n_sinks, ends)], 1)
    return torch.cat([doubled.flatten(), cu_q[-1:]]), torch.cat([keys.flatten(), cu_k[-1:]])


def _padding_apart(inputs, n_hidden):
    bounds = bounds_of(inputs)
    (batch, len_q), len_k = inputs.q.shape[:2], inputs.k.shape[1]
    index = torch.arange(batch, device=inputs.q.device)
    end_k = torch.maximum(bounds.used_k, bounds.first_key)
    first_key = torch.minimum(bounds.first_key + n_hidden, end_k)
    rows, end = index * len_q, index * len_k + end_k
    # keys behind the end of one sequence and before the first of the next have no rows together
    before = torch.cat([end.new_zeros(1), end[:-1]])
    starts_q = torch.stack([rows, rows, rows + bounds.used_q], 1)
    starts_k = torch.stack([before, index * len_k + first_key, end], 1)
    last_q, last_k = starts_q.new_full((1,), batch * len_q), end[-1:]
    cu_q = _join(torch.cat([starts_q.flatten(), last_q]), batch * len_q)
    return cu_q, _join(torch.cat([starts_k.flatten(), last_k]), batch * len_k)


def hidden_keys(inputs):
    """[B, Tk] or [total_k] bool: keys that a kernel with hidden sinks was shown without rows."""
    if inputs.is_varlen:
        starts, ends = (x.long()[:, None] for x in (inputs.cu_seqlens_k[:-1], inputs.cu_seqlens_k[1:]))
        keys = starts + torch.arange(inputs.n_sinks, device=starts.device)
        total = inputs.k.shape[0]
        # a sequence without keys must not mark the next one's
        marks = torch.zeros(total, dtype=torch.int32, device=starts.device)
        return marks.scatter_add_(0, keys.clamp(max=total - 1).flatten(), (keys < ends).int().flatten()) > 0
    bounds = bounds_of(inputs)
    key = torch.arange(inputs.k.shape[1], device=inputs.k.device)
    return (key < bounds.first_key[:, None] + inputs.n_sinks) | (key >= bounds.used_k[:, None])


def pack_rows(rows):
    """[B, H, T] -> [H, B * T], as a packed kernel has them."""
    return rows.transpose(0, 1).flatten(1)


def unpack_rows(rows, batch):
    """[H, B * T] -> [B, H, T]."""
    return rows.unflatten(1, (batch, -1)).transpose(0, 1).contiguous()
