"""Which rows and keys of a dense problem are real, as [B] tensors and as [B, T] masks."""

from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """[B] int64 each: the real keys are [first_key, used_k), the real rows [0, used_q)."""

    first_key: Tensor
    used_q: Tensor
    used_k: Tensor


def bounds_of(inputs):
    batch, len_q = inputs.q.shape[:2]
    zero = torch.zeros(batch, dtype=torch.int64, device=inputs.q.device)
    return Bounds(
        zero if inputs.leftpad_k is None else inputs.leftpad_k.long(),
        zero + len_q if inputs.seqused_q is None else inputs.seqused_q.long(),
        zero + inputs.k.shape[1] if inputs.seqused_k is None else inputs.seqused_k.long(),
    )


def visible_keys(inputs, bounds, rows, keys):
    """[B, len(rows), len(keys)] bool for row indices `rows` and key indices `keys` ([n], or [B, n] of its own)."""
    first_key, used_q, used_k = (x[:, None, None] for x in bounds)
    row = rows[None, :, None]
    key = keys[None, None, :] if keys.dim() == 1 else keys[:, None, :]
    position = row + used_k - used_q
    left, right = inputs.window_bounds
    visible = (key >= first_key) & (key < used_k) & (row < used_q)
    if right >= 0:
        visible &= key <= position + right
    if left >= 0:
        visible &= key >= position - left
    return visible
