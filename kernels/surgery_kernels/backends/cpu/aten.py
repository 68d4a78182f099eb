"""torch's own flash attention for CPU, made to return and differentiate lse and sink mass.

The kernel knows one mask shape without N^2 memory, keys [B, 1, 1, Tk], and a causal mask aligned at the top left.
That is enough for padded self-attention: padding on the right needs no mask at all under a causal one, since no
real row reaches it. What it cannot do (windows, softcap, other alignments, other statistics) runs in `blocked`.
"""

from dataclasses import replace

import torch
from torch.nn.functional import pad

from .. import sink_epilogue
from ..sink_epilogue.bounds import bounds_of, visible_keys

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# exp(s - HUGE) is 0: the lse of rows that see no key, for the kernel's backward
HUGE = 1e30
# before torch 2.9 the kernel reads past the end of k and v when they have fewer heads than q
GROUPED_HEADS = torch.torch_version.TorchVersion(torch.__version__) >= (2, 9)
# channels that `_backward_bf16` adds to the head dim: three are needed, a multiple of 16 is fast
SPARE = 16


def can_run(inputs):
    len_q, len_k = inputs.q.shape[1], inputs.k.shape[1]
    left, right = inputs.window_size
    if inputs.softcap or set(inputs.stats) - {"sink_mass"}:
        return False
    if not GROUPED_HEADS and inputs.q.shape[2] != inputs.k.shape[2]:
        return False
    if inputs.softmax_scale <= 0.0:
        # the kernel scales its causal -inf
        return False
    if 0 in inputs.q.shape or 0 in inputs.k.shape or inputs.q.dtype == torch.float16:
        return False
    if inputs.causal:
        bounds = bounds_of(inputs)
        # a window that spans the sequence is none
        return (left < 0 or left >= len_k - 1) and len_q == len_k and torch.equal(bounds.used_q, bounds.used_k)
    return left < 0 and right < 0


def _key_mask(inputs, bounds):
    """[B, 1, 1, Tk] additive mask of q's dtype, or None when no real row reaches a padded key."""
    len_k = inputs.k.shape[1]
    if not bounds.first_key.any() and (inputs.causal or bool((bounds.used_k == len_k).all())):
        return None
    key = torch.arange(len_k)
    real = (key >= bounds.first_key[:, None]) & (key < bounds.used_k[:, None])
    mask = torch.zeros(real.shape, dtype=inputs.q.dtype).masked_fill_(~real, float("-inf"))
    return mask[:, None, None, :]


def _blind_rows(inputs, bounds):
    """[B, Tq] bool, rows that see no key; None when there is none."""
    row = torch.arange(inputs.q.shape[1])
    blind = row >= bounds.used_q[:, None]
    blind |= (bounds.used_k <= bounds.first_key)[:, None]
    if inputs.causal:
        blind |= row < bounds.first_key[:, None]
    return blind if blind.any() else None


def _kernel_layout(x):
    """[B, T, H, D] -> [B, H, T, D]; the kernel takes any strides but reads the last dimension as contiguous."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _sinks(inputs, bounds):
    keys = sink_epilogue.sink_keys(inputs, bounds.first_key, bounds.used_k)
    sees = visible_keys(inputs, bounds, torch.arange(inputs.q.shape[1]), keys.index) & keys.valid[:, None]
    return keys, sees


def forward(inputs):
    bounds = bounds_of(inputs)
    out, lse = _flash(
        *(_kernel_layout(x) for x in (inputs.q, inputs.k, inputs.v)),
        0.0,
        inputs.causal,
        attn_mask=_key_mask(inputs, bounds),
        scale=inputs.softmax_scale,
    )
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()
    blind = _blind_rows(inputs, bounds)
    if blind is not None:
        out.masked_fill_(blind[:, :, None, None], 0.0)
        lse.masked_fill_(blind[:, None, :], float("-inf"))
    stats = lse.new_zeros(len(inputs.stats), *lse.shape)
    if inputs.stats:
        keys, sees = _sinks(inputs, bounds)
        stats[0] = sink_epilogue.sink_mass(inputs, keys, lse, sees)
    return out, lse, stats


def backward(inputs, out, lse, stats, dout, dlse, dstats):
    bounds = bounds_of(inputs)
    blind = _blind_rows(inputs, bounds)
    dout = torch.zeros_like(out) if dout is None else dout
    kernel_lse = lse
    if blind is not None:
        kernel_lse = lse.masked_fill(blind[:, None, :], HUGE)
        dout = dout.masked_fill(blind[:, :, None, None], 0.0)
    g = dstats[0] if dstats is not None and inputs.stats else None
    if g is None and dlse is None:
        return _run_backward(inputs, out, dout, kernel_lse, _key_mask(inputs, bounds))
    extra = torch.zeros_like(lse) if dlse is None else -dlse
    if g is not None:
        extra = extra + g * stats[0]
    if blind is not None:
        extra = extra.masked_fill(blind[:, None, :], 0.0)
        g = None if g is None else g.masked_fill(blind[:, None, :], 0.0)
    if inputs.q.dtype == torch.bfloat16:
        return _backward_bf16(inputs, bounds, out, lse, dout, extra, g, kernel_lse)
    folded, folded_dout = sink_epilogue.fold_into_out(out, dout, extra)
    dq, dk, dv = _run_backward(inputs, folded, folded_dout, kernel_lse, _key_mask(inputs, bounds))
    if g is not None:
        keys, sees = _sinks(inputs, bounds)
        sink_epilogue.add_sink_gradient(inputs, keys, lse, sees, g, dq, dk)
    return dq, dk, dv


def _run_backward(inputs, out, dout, lse, mask):
    """The kernel's backward; dq, dk, dv [B, T, H, D] contiguous."""
    grads = _flash_backward(
        *(_kernel_layout(x) for x in (dout, inputs.q, inputs.k, inputs.v, out)),
        lse,
        0.0,
        inputs.causal,
        attn_mask=mask,
        scale=inputs.softmax_scale,
    )
    return tuple(x.transpose(1, 2).contiguous() for x in grads)


def _backward_bf16(inputs, bounds, out, lse, dout, extra, g, kernel_lse):
    """Two things that bf16 would lose where the sink is strong.

    delta's extra term would be rounded inside out': it goes into spare channels of out, split in three, against ones
    in dout. And p (g - g sink_mass) cancels on the sink keys: they are masked from the kernel, and their column of ds
    is computed in fp32.
    """
    head_dim = inputs.q.shape[-1]
    padded = [pad(x, (0, SPARE)) for x in (inputs.q, inputs.k, inputs.v, out, dout)]
    rest = extra.transpose(1, 2)
    for channel in range(head_dim, head_dim + 3):
        part = rest.to(torch.bfloat16)
        padded[3][..., channel], padded[4][..., channel] = part, 1.0
        rest = rest - part.to(rest.dtype)
    mask = _key_mask(inputs, bounds)
    if g is not None:
        keys, sees = _sinks(inputs, bounds)
        is_sink = torch.zeros(inputs.k.shape[:2], dtype=torch.int64).scatter_add_(1, keys.index, keys.valid.long()) > 0
        mask = inputs.q.new_zeros(1, 1, 1, 1) if mask is None else mask
        mask = torch.where(is_sink[:, None, None, :], float("-inf"), mask)
    wide = replace(inputs, q=padded[0], k=padded[1], v=padded[2])
    dq, dk, dv = (x[..., :head_dim] for x in _run_backward(wide, padded[3], padded[4], kernel_lse, mask))
    if g is not None:
        delta = (dout.float() * out.float()).sum(-1).transpose(1, 2) + extra
        sink_epilogue.add_sink_columns(inputs, keys, lse, sees, g - delta, dout, dq, dk, dv)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()
