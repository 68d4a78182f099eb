"""The oracle: eager attention that materialises the score matrix [B, H, Tq, Tk].

Any device, fp64 to bf16; everything is computed in fp32 (fp64 for fp64 inputs) and rounded once at the end.
"""

import torch

from ..stats import STATS
from ..types import Backend
from . import per_sequence


def unsupported_reasons(inputs):
    return []


def _visible(inputs):
    """[B, Tq, Tk] bool: which key each row sees, and [B, Tk] bool: which keys are sinks."""
    q, k = inputs.q, inputs.k
    batch, len_q, len_k = q.shape[0], q.shape[1], k.shape[1]
    zero = torch.zeros(batch, dtype=torch.long, device=q.device)
    first = zero if inputs.leftpad_k is None else inputs.leftpad_k.long()
    used_q = zero + len_q if inputs.seqused_q is None else inputs.seqused_q.long()
    used_k = zero + len_k if inputs.seqused_k is None else inputs.seqused_k.long()
    row = torch.arange(len_q, device=q.device)[None, :, None]
    key = torch.arange(len_k, device=q.device)[None, None, :]
    position = row + (used_k - used_q)[:, None, None]
    visible = (key >= first[:, None, None]) & (key < used_k[:, None, None]) & (row < used_q[:, None, None])
    left, right = inputs.window_size
    if inputs.causal:
        visible = visible & (key <= position)
    elif right >= 0:
        visible = visible & (key <= position + right)
    if left >= 0:
        visible = visible & (key >= position - left)
    offset = key[:, 0] - first[:, None]
    if inputs.sinks is None:
        is_sink = (offset >= 0) & (offset < inputs.n_sinks)
    else:
        is_sink = (offset[:, :, None] == inputs.sinks[:, None, :]).any(-1)
    return visible, is_sink


def _heads_first(x, inputs):
    """[B, T, H_kv, D] -> [B, H, T, D] in the rows' dtype."""
    x = x.transpose(1, 2).to(inputs.rows_dtype)
    return x.repeat_interleave(inputs.q.shape[2] // x.shape[1], dim=1)


def _attend(inputs):
    """Scores, probabilities and row quantities, all [B, H, Tq, ...]; -inf and 0 where invisible."""
    q, k = _heads_first(inputs.q, inputs), _heads_first(inputs.k, inputs)
    s = torch.matmul(q, k.transpose(-1, -2)) * inputs.softmax_scale
    if inputs.softcap:
        s = inputs.softcap * torch.tanh(s / inputs.softcap)
    visible, is_sink = _visible(inputs)
    s = s.masked_fill(~visible[:, None], float("-inf"))
    lse = torch.logsumexp(s, -1)
    empty = lse == float("-inf")
    p = torch.exp(s - lse.masked_fill(empty, 0.0).unsqueeze(-1))
    return s, p, lse, empty, is_sink[:, None, None, :].to(s.dtype)


def forward(inputs):
    if inputs.is_varlen:
        return per_sequence.forward(inputs, forward)
    s, p, lse, empty, is_sink = _attend(inputs)
    out = torch.matmul(p, _heads_first(inputs.v, inputs)).transpose(1, 2).to(inputs.q.dtype).contiguous()
    stats = lse.new_zeros(len(inputs.stats), *lse.shape)
    for row, name in zip(stats, inputs.stats, strict=True):
        if s.shape[-1]:
            row.copy_(STATS[name].value(s, p, lse, is_sink).masked_fill(empty, 0.0))
    return out, lse, stats


def backward(inputs, out, lse, stats, dout, dlse, dstats):
    if inputs.is_varlen:
        return per_sequence.backward(inputs, backward, out, lse, stats, dout, dlse, dstats)
    s, p, lse, empty, is_sink = _attend(inputs)
    lse = lse.masked_fill(empty, 0.0)
    q, k, v = (_heads_first(x, inputs) for x in (inputs.q, inputs.k, inputs.v))
    dp, delta, ds_stat = torch.zeros_like(s), torch.zeros_like(lse), None
    dv = torch.zeros_like(v)
    if dout is not None:
        do = _heads_first(dout, inputs)
        dp = torch.matmul(do, v.transpose(-1, -2))
        # rowsum(dout * out), taken as rowsum(p * dp): independent of the stored out
        delta = (p * dp).sum(-1)
        dv = torch.matmul(p.transpose(-1, -2), do)
    if dlse is not None:
        delta = delta - dlse
    for index, name in enumerate(inputs.stats):
        if dstats is None or not s.shape[-1]:
            break
        stat, g, value = STATS[name], dstats[index].masked_fill(empty, 0.0), stats[index]
        if stat.dp:
            dp = dp + stat.dp(g, s, lse, is_sink)
        if stat.ddelta:
            delta = delta + stat.ddelta(g, value)
        if stat.ds:
            term = stat.ds(g, s, value)
            ds_stat = term if ds_stat is None else ds_stat + term
    ds = p * (dp - delta.masked_fill(empty, 0.0).unsqueeze(-1))
    if ds_stat is not None:
        ds = ds + ds_stat
    if inputs.softcap:
        # d softcap * tanh(x / softcap) = 1 - (s / softcap)^2
        ds = ds * (1 - (s.masked_fill(s == float("-inf"), 0.0) / inputs.softcap) ** 2)
    ds = ds * inputs.softmax_scale
    dq, dk = torch.matmul(ds, k), torch.matmul(ds.transpose(-1, -2), q)
    # [B, H, T, D] -> [B, T, H_kv, D], summed over the heads of a group
    return tuple(
        dx.unflatten(1, (x.shape[2], -1)).sum(2).transpose(1, 2).to(x.dtype).contiguous()
        for dx, x in ((dq, inputs.q), (dk, inputs.k), (dv, inputs.v))
    )


BACKEND = Backend(
    "reference", "any device, fp64 to bf16; materialises the score matrix", unsupported_reasons, forward, backward
)
