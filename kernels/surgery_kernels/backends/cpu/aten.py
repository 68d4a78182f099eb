"""torch's own flash attention for CPU, made to return and differentiate lse and sink mass.

The kernel knows one mask shape without N^2 memory, keys [B, 1, 1, Tk], and a causal mask aligned at the top left.
That is enough for padded self-attention: padding on the right needs no mask at all under a causal one, since no
real row reaches it. What it cannot do (windows, softcap, other alignments, other statistics) runs in `blocked`.
"""

from dataclasses import replace

import torch

from .. import sink_epilogue
from .bounds import bounds_of, visible_keys

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# exp(s - HUGE) is 0: the lse of rows that see no key, for the kernel's backward
HUGE = 1e30


def can_run(inputs):
    len_q, len_k = inputs.q.shape[1], inputs.k.shape[1]
    left, right = inputs.window_size
    if inputs.softcap or set(inputs.stats) - {"sink_mass"}:
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
    kernel_out, kernel_dout, dtype = out, dout, inputs.q.dtype
    if g is not None or dlse is not None:
        # in bf16 `extra` would be rounded inside out', and p (g - g sink_mass) cancels where the sink is strong
        q, k, v, out, dout = (x.to(lse.dtype) for x in (inputs.q, inputs.k, inputs.v, out, dout))
        inputs = replace(inputs, q=q, k=k, v=v)
        extra = torch.zeros_like(lse)
        if dlse is not None:
            extra = extra - dlse
        if g is not None:
            extra = extra + g * stats[0]
        if blind is not None:
            extra = extra.masked_fill(blind[:, None, :], 0.0)
            g = None if g is None else g.masked_fill(blind[:, None, :], 0.0)
        kernel_out, kernel_dout = sink_epilogue.fold_into_out(out, dout, extra)
    dq, dk, dv = _flash_backward(
        *(_kernel_layout(x) for x in (kernel_dout, inputs.q, inputs.k, inputs.v, kernel_out)),
        kernel_lse,
        0.0,
        inputs.causal,
        attn_mask=_key_mask(inputs, bounds),
        scale=inputs.softmax_scale,
    )
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in (dq, dk, dv))
    if g is not None:
        keys, sees = _sinks(inputs, bounds)
        sink_epilogue.add_sink_gradient(inputs, keys, lse, sees, g, dq, dk)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
