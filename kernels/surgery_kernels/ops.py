"""The registered operator `surgery::attn_stats`: schemas, fakes and autograd. No mathematics.

`attn_forward` and `attn_backward` are the same pair without autograd, for a caller that registers an operator of
its own around them.
"""

import torch
from torch import Tensor

from .backends import BACKENDS
from .types import AttnInputs


def attn_forward(inputs, backend):
    """Attention and its statistics, no autograd.

    Args:
        inputs: AttnInputs.
        backend: a key of BACKENDS, see `choose_backend`.
    Returns:
        out shaped as q, lse and stats [S, *rows] as `AttnOutput` describes them.
    """
    with torch.autocast(inputs.q.device.type, enabled=False):
        return BACKENDS[backend].forward(inputs)


def attn_backward(inputs, out, lse, stats, dout, dlse, dstats, backend):
    """Gradients of `attn_forward`.

    Args:
        inputs, out, lse, stats: what the forward got and returned.
        dout, dlse, dstats: gradients shaped as out, lse and stats, or None where there is none.
        backend: the backend of the forward.
    Returns:
        dq, dk, dv, contiguous, in the inputs' dtypes.
    """
    with torch.autocast(inputs.q.device.type, enabled=False):
        return BACKENDS[backend].backward(inputs, out, lse, stats, dout, dlse, dstats)


def empty_outputs(inputs):
    """Unwritten (out, lse, stats) of the right shapes, dtypes and strides: the fake of `attn_forward`."""
    rows = inputs.q.new_empty(inputs.rows_shape, dtype=inputs.rows_dtype)
    return inputs.q.new_empty(inputs.q.shape), rows, rows.new_empty((len(inputs.stats), *inputs.rows_shape))


def _inputs(
    q,
    k,
    v,
    sinks,
    leftpad_k,
    seqused_q,
    seqused_k,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    causal,
    window_left,
    window_right,
    softcap,
    n_sinks,
    stats,
):
    return AttnInputs(
        q,
        k,
        v,
        softmax_scale,
        causal,
        (window_left, window_right),
        softcap,
        tuple(stats.split(",")) if stats else (),
        n_sinks,
        sinks,
        leftpad_k,
        seqused_q,
        seqused_k,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
    )


def run(inputs, backend):
    """Call the registered operator on `inputs`: (out, lse, stats), all differentiable."""
    return _attn_stats(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.sinks,
        inputs.leftpad_k,
        inputs.seqused_q,
        inputs.seqused_k,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        inputs.max_seqlen_q,
        inputs.max_seqlen_k,
        inputs.softmax_scale,
        inputs.causal,
        inputs.window_size[0],
        inputs.window_size[1],
        inputs.softcap,
        inputs.n_sinks,
        ",".join(inputs.stats),
        backend,
    )


@torch.library.custom_op("surgery::attn_stats", mutates_args=())
def _attn_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    n_sinks: int,
    stats: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _inputs(
        q,
        k,
        v,
        sinks,
        leftpad_k,
        seqused_q,
        seqused_k,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        n_sinks,
        stats,
    )
    return attn_forward(inputs, backend)


@_attn_stats.register_fake
def _(q, k, v, *rest):
    return empty_outputs(_inputs(q, k, v, *rest[:-1]))


@torch.library.custom_op("surgery::attn_stats_backward", mutates_args=())
def _attn_stats_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    dstats: Tensor | None,
    out: Tensor,
    lse: Tensor,
    stat_rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    n_sinks: int,
    stats: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _inputs(
        q,
        k,
        v,
        sinks,
        leftpad_k,
        seqused_q,
        seqused_k,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        n_sinks,
        stats,
    )
    return attn_backward(inputs, out, lse, stat_rows, dout, dlse, dstats, backend)


@_attn_stats_backward.register_fake
def _(dout, dlse, dstats, out, lse, stat_rows, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.scalars = inputs[9:]
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse, dstats):
    if dout is None and dlse is None and dstats is None:
        return (None,) * 19
    # once: non-reentrant checkpointing refuses a second look
    saved = ctx.saved_tensors
    dq, dk, dv = _attn_stats_backward(dout, dlse, dstats, *saved[9:], *saved[:9], *ctx.scalars)
    # q, k, v; then 6 index tensors and 10 scalars without gradient
    return (dq, dk, dv, *(None,) * 16)


_attn_stats.register_autograd(_autograd, setup_context=_setup_context)
