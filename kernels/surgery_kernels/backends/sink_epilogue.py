"""Sink mass around an attention kernel that knows nothing of it, in torch, O(T) memory.

Forward: p_ij = exp(s_ij - lse_i) on the few sink keys j. Backward, with g = dL/d sink_mass:

    ds_ij = p_ij * (dp_ij - delta_i)                    the kernel's own, with delta = rowsum(dout * out)
          + p_ij * (dlse_i - g_i * sink_mass_i)         `fold_into_out`: move it into the kernel's delta
          + p_ij * g_i [j in S]                         `add_sink_gradient`: a rank-n update

A flash backward uses `out` for nothing but delta, so handing it out' = out - x * dout / |dout|^2 makes its delta
rowsum(dout * out) - x. A row whose dout is zero has no such out'; it gets a dout of TINY in one channel instead,
which changes dv by TINY.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# A power of two, so exact in every dtype: folding divides by it in fp32 and the kernel multiplies in bf16. Its
# square is still a normal number in float32 and bfloat16.
TINY = 2.0**-60


class SinkKeys(NamedTuple):
    """Sink keys of dense inputs: index [B, n] into Tk, and valid [B, n] (real, not a repetition)."""

    index: Tensor
    valid: Tensor


def sink_keys(inputs, first_key, used_k):
    """Positions of the sink keys.

    Args:
        inputs: dense AttnInputs.
        first_key, used_k: [B] int64, the real keys of a sequence are [first_key, used_k).
    """
    if inputs.sinks is None:
        offset = torch.arange(inputs.n_sinks, device=first_key.device).expand(first_key.shape[0], -1)
        repeated = torch.zeros_like(offset, dtype=torch.bool)
    else:
        offset = inputs.sinks.long()
        repeated = (offset[:, :, None] == offset[:, None, :]).tril(-1).any(-1)
    index = offset + first_key[:, None]
    valid = (offset >= 0) & (index < used_k[:, None]) & ~repeated
    return SinkKeys(torch.where(valid, index, 0), valid)


def _sink_scores(inputs, keys):
    """q [B, H_kv, G, T, D] and k [B, H_kv, n, D] of the sinks in the rows' dtype, scores [B, H_kv, G, T, n]."""
    dtype = inputs.rows_dtype
    index = keys.index[:, :, None, None].expand(-1, -1, *inputs.k.shape[2:])
    k = inputs.k.gather(1, index).transpose(1, 2).to(dtype)
    q = inputs.q.transpose(1, 2).unflatten(1, (k.shape[1], -1)).to(dtype)
    return q, k, torch.einsum("bhgtd,bhnd->bhgtn", q, k) * inputs.softmax_scale


def _sink_probabilities(inputs, keys, lse, sees):
    """p [B, H_kv, G, T, n] on the sink keys; `sees` [B, T, n] says which of them a row sees."""
    q, k, s = _sink_scores(inputs, keys)
    lse = lse.unflatten(1, (k.shape[1], -1)).unsqueeze(-1)
    visible = sees[:, None, None] & (lse != float("-inf"))
    return q, k, torch.exp(torch.where(visible, s - lse, float("-inf")))


def sink_mass(inputs, keys, lse, sees):
    """[B, H, T] attention on the sink keys."""
    _, _, p = _sink_probabilities(inputs, keys, lse, sees)
    return p.sum(-1).flatten(1, 2)


def fold_into_out(out, dout, extra_delta):
    """(out', dout') with rowsum(dout' * out') = rowsum(dout * out) + extra_delta, see the module's docstring.

    Args:
        out, dout: [B, T, H, D].
        extra_delta: [B, H, T].
    """
    extra = extra_delta.transpose(1, 2).unsqueeze(-1)
    wide = dout.to(extra.dtype)
    norm = (wide * wide).sum(-1, keepdim=True).sqrt()
    silent = norm < TINY
    norm = norm.masked_fill(silent, 1.0)
    # divided twice: extra / norm ** 2 would overflow for an extra of a few hundred
    shift = (wide / norm) * (extra / norm)
    folded = out.to(extra.dtype) + shift.masked_fill(silent, 0.0)
    silent &= extra != 0
    if silent.any():
        folded[..., :1] += torch.where(silent, extra / TINY, 0.0)
        dout = dout.clone()
        dout[..., :1].masked_fill_(silent, TINY)
    return folded.to(out.dtype), dout


def add_sink_gradient(inputs, keys, lse, sees, g, dq, dk):
    """Add p_ij g_i [j in S] of ds to dq [B, Tq, H, D] and dk [B, Tk, H_kv, D], in place.

    Args:
        g: [B, H, T] gradient of sink_mass.
    """
    q, k, p = _sink_probabilities(inputs, keys, lse, sees)
    ds = p * g.unflatten(1, (k.shape[1], -1)).unsqueeze(-1) * inputs.softmax_scale
    dq += torch.einsum("bhgtn,bhnd->bthgd", ds, k).flatten(2, 3).to(dq.dtype)
    dk_sink = torch.einsum("bhgtn,bhgtd->bnhd", ds, q).to(dk.dtype)
    index = keys.index[:, :, None, None].expand_as(dk_sink)
    dk.scatter_add_(1, index, dk_sink * keys.valid[:, :, None, None])


def add_sink_columns(inputs, keys, lse, sees, shift, dout, dq, dk, dv):
    """Add the whole gradient of the sink keys' columns, which the kernel left out, in place.

    ds_ij = p_ij * (dp_ij + shift_i),  dv_j = sum_i p_ij dout_i  for j in S

    Args:
        shift: [B, H, T], g - delta.
        dout: [B, T, H, D].
        dq: [B, T, H, D]; dk, dv: [B, Tk, H_kv, D].
    """
    q, k, p = _sink_probabilities(inputs, keys, lse, sees)
    n_kv = k.shape[1]
    index = keys.index[:, :, None, None].expand(-1, -1, *inputs.v.shape[2:])
    v = inputs.v.gather(1, index).transpose(1, 2).to(p.dtype)
    do = dout.transpose(1, 2).unflatten(1, (n_kv, -1)).to(p.dtype)
    dp = torch.einsum("bhgtd,bhnd->bhgtn", do, v)
    ds = p * (dp + shift.unflatten(1, (n_kv, -1)).unsqueeze(-1)) * inputs.softmax_scale
    dq += torch.einsum("bhgtn,bhnd->bthgd", ds, k).flatten(2, 3).to(dq.dtype)
    for target, weight, rows in ((dk, ds, q), (dv, p, do)):
        added = torch.einsum("bhgtn,bhgtd->bnhd", weight, rows).to(target.dtype)
        target.scatter_add_(1, index, added)
