"""The epilogue in torch, O(T) memory: exact, slower than the CUDA kernels, and the double that tests compare them with.

Dense inputs only; `apart` runs packed ones a sequence at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import bounds_of, visible_keys

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


def sinks_of(inputs):
    """SinkKeys, and [B, Tq, n] bool: which of them a row sees."""
    bounds = bounds_of(inputs)
    keys = sink_keys(inputs, bounds.first_key, bounds.used_k)
    rows = torch.arange(inputs.q.shape[1], device=inputs.q.device)
    return keys, visible_keys(inputs, bounds, rows, keys.index) & keys.valid[:, None]


def _sink_scores(inputs, keys):
    """q [B, H_kv, G, T, D] and k [B, H_kv, n, D] of the sinks in the rows' dtype, scores [B, H_kv, G, T, n]."""
    dtype = inputs.rows_dtype
    index = keys.index[:, :, None, None].expand(-1, -1, *inputs.k.shape[2:])
    k = inputs.k.gather(1, index).transpose(1, 2).to(dtype)
    q = inputs.q.transpose(1, 2).unflatten(1, (k.shape[1], -1)).to(dtype)
    s = torch.einsum("bhgtd,bhnd->bhgtn", q, k) * inputs.softmax_scale
    return q, k, inputs.softcap * torch.tanh(s / inputs.softcap) if inputs.softcap else s


def _sink_probabilities(inputs, keys, lse, sees):
    """q, k and p [B, H_kv, G, T, n] on the sink keys, and ds / d (q . k); `sees` [B, T, n]: which a row sees."""
    q, k, s = _sink_scores(inputs, keys)
    lse = lse.unflatten(1, (k.shape[1], -1)).unsqueeze(-1)
    visible = sees[:, None, None] & (lse != float("-inf"))
    slope = inputs.softmax_scale
    if inputs.softcap:
        slope = slope * (1 - (s / inputs.softcap) ** 2)
    return q, k, torch.exp(torch.where(visible, s - lse, float("-inf"))), slope


def sink_mass(inputs, keys, lse, sees):
    """[B, H, T] attention on the sink keys."""
    return _sink_probabilities(inputs, keys, lse, sees)[2].sum(-1).flatten(1, 2)


def delta_of(out, dout, extra_delta):
    """rowsum(dout * out) + extra_delta, [B, H, T] in extra_delta's dtype."""
    return (dout.to(extra_delta.dtype) * out.to(extra_delta.dtype)).sum(-1).transpose(1, 2) + extra_delta


def fold_into_out(out, dout, extra_delta):
    """(out', dout') with rowsum(dout' * out') = rowsum(dout * out) + extra_delta.

    out' is 0 but in the two channels where |dout| is largest: the first carries delta rounded to out's dtype, the
    second what the rounding left, so the sum is exact to twice that precision. Where dout is smaller than TINY
    there, dout' is TINY instead, which changes dv by TINY.

    Args:
        out, dout: [B, T, H, D].
        extra_delta: [B, H, T].
    """
    rest = delta_of(out, dout, extra_delta).transpose(1, 2).unsqueeze(-1)
    folded, dout = torch.zeros_like(out), dout.clone()
    for channel in dout.abs().topk(min(2, dout.shape[-1]), -1).indices.split(1, -1):
        weight = dout.gather(-1, channel)
        weight = torch.where((weight.abs() < TINY) & (rest != 0), TINY, weight).to(dout.dtype)
        carried = torch.where(rest != 0, rest / weight.to(rest.dtype), 0.0).to(out.dtype)
        dout.scatter_(-1, channel, weight)
        folded.scatter_(-1, channel, carried)
        rest = rest - weight.to(rest.dtype) * carried.to(rest.dtype)
    return folded, dout


def add_sink_gradient(inputs, keys, lse, sees, g, dq, dk):
    """Add p_ij g_i [j in S] of ds to dq [B, Tq, H, D] and dk [B, Tk, H_kv, D], in place.

    Args:
        g: [B, H, T] gradient of sink_mass.
    """
    q, k, p, slope = _sink_probabilities(inputs, keys, lse, sees)
    ds = p * g.unflatten(1, (k.shape[1], -1)).unsqueeze(-1) * slope
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
    q, k, p, slope = _sink_probabilities(inputs, keys, lse, sees)
    n_kv = k.shape[1]
    index = keys.index[:, :, None, None].expand(-1, -1, *inputs.v.shape[2:])
    v = inputs.v.gather(1, index).transpose(1, 2).to(p.dtype)
    do = dout.transpose(1, 2).unflatten(1, (n_kv, -1)).to(p.dtype)
    dp = torch.einsum("bhgtd,bhnd->bhgtn", do, v)
    ds = p * (dp + shift.unflatten(1, (n_kv, -1)).unsqueeze(-1)) * slope
    # one rounding: the sum is in the rows' dtype
    dq.copy_(dq + torch.einsum("bhgtn,bhnd->bthgd", ds, k).flatten(2, 3))
    for target, weight, rows in ((dk, ds, q), (dv, p, do)):
        added = torch.einsum("bhgtn,bhgtd->bnhd", weight, rows)
        target.scatter_add_(1, index, added.to(target.dtype))
