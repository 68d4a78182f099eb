"""Attention whose backward adds the regulariser's gradient: `surgery::penalty_attn`.

The probe batch is [harmful; refusal] rows. With m_bi the sink mass of row i, w_bi its weight (1 / counted rows) and
u_b the sequence's share in d (1 / n_harmful, or -1 / n_refusal):

    alpha_b = sum_i w_bi m_bi;   d = sum_b u_b alpha_b;   penalty = coefficient * sum_heads relu(d)
    dpenalty / dm_bi = coefficient * [d > 0] * u_b * w_bi

A batch that is only a part (a chunk, a rank's share of a global batch) cannot know the sign of d: it is then given
as `positive`, measured by an earlier pass. Everything is layer-local, so that no tensor leaves the layer: values are
copied out, and the gradient enters inside this operator's backward, which also consumes the gradient of `out`. Under
reentrant checkpointing, FSDP2, mixed precision and compile that is the one place where it is never lost (README, "How
the gradient gets in").

`control` [1 + L] fp32 is read and written while the backward runs: control[0] is the upstream gradient times the
coefficient, set by `Relay`; control[1 + layer] becomes 1 when the layer's gradient has been added.
"""

import torch
from surgery_kernels import attn_backward, attn_forward, make_inputs
from torch import Tensor


def _inputs(q, k, v, bounds, sinks, n_sinks, softmax_scale, causal, window_left, window_right, softcap):
    first, end = (x.contiguous() for x in bounds.unbind(1))
    return make_inputs(
        q,
        k,
        v,
        softmax_scale,
        causal,
        (window_left, window_right),
        softcap,
        n_sinks if sinks is None else sinks,
        ("sink_mass",),
        leftpad_k=first,
        seqused_q=end,
        seqused_k=end,
    )


def sequence_means(sink_mass, row_weight):
    """alpha [B, H] = weighted sum over rows of sink_mass [B, H, T] with row_weight [B, T] (paper, eq. 2)."""
    # no matrix product: autocast would round its factors
    return (sink_mass * row_weight[:, None]).sum(-1)


def head_divergence(alpha, n_harmful):
    """d [H]: mean of alpha [B, H] over the first `n_harmful` sequences minus that over the others (eq. 3)."""
    return alpha[:n_harmful].mean(0) - alpha[n_harmful:].mean(0)


@torch.library.custom_op("surgery::penalty_attn", mutates_args=())
def penalty_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    row_weight: Tensor,
    share: Tensor,
    positive: Tensor | None,
    control: Tensor,
    layer: int,
    n_harmful: int,
    n_sinks: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a probe batch.

    Args:
        q: [B, T, H, D]; k, v: [B, T, H_kv, D].
        bounds: int32 [B, 2], see `masks.padding_bounds`.
        sinks: int32 [B, n] positions, or None for the first `n_sinks` tokens.
        row_weight: [B, T] fp32, sums to 1 in each sequence.
        share: [B] fp32, positive on harmful sequences, negative on refusals.
        positive: [L, H] fp32, [d > 0] of every head, or None: from this batch.
        control: [1 + L] fp32, see the module's docstring.
        layer: index of this layer.
        n_harmful: number of harmful sequences, the first ones; read where `positive` is None.
    Returns:
        out [B, T, H, D], lse [B, H, T], sink_mass [B, H, T].
    """
    inputs = _inputs(q, k, v, bounds, sinks, n_sinks, softmax_scale, causal, window_left, window_right, softcap)
    out, lse, stats = attn_forward(inputs, backend)
    return out, lse, stats[0].clone()


@penalty_attn.register_fake
def _(q, k, v, *rest):
    rows = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_rows_dtype(q))
    return q.new_empty(q.shape), rows, torch.empty_like(rows)


def _rows_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# The write to control is hidden from the schema: a declared one bumps its version, and autograd then refuses the
# layers that still hold it. It only ever sets a flag that nothing in the graph reads.
@torch.library.custom_op("surgery::penalty_attn_backward", mutates_args=())
def _penalty_attn_backward(
    dout: Tensor,
    control: Tensor,
    out: Tensor,
    lse: Tensor,
    sink_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    sinks: Tensor | None,
    row_weight: Tensor,
    share: Tensor,
    positive: Tensor | None,
    layer: int,
    n_harmful: int,
    n_sinks: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if positive is None:
        counted = (head_divergence(sequence_means(sink_mass, row_weight), n_harmful) > 0).to(row_weight.dtype)
    else:
        counted = positive[layer]
    # [B, H, T] = scale * [d > 0] * u * w
    dmass = control[0] * torch.einsum("h,b,bt->bht", counted, share, row_weight)
    control.data[1 + layer] = 1.0
    inputs = _inputs(q, k, v, bounds, sinks, n_sinks, softmax_scale, causal, window_left, window_right, softcap)
    stats, dstats = sink_mass.unsqueeze(0), dmass.to(sink_mass.dtype).unsqueeze(0)
    return attn_backward(inputs, out, lse, stats, dout, None, dstats, backend)


@_penalty_attn_backward.register_fake
def _(dout, control, out, lse, sink_mass, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *saved, control = inputs[:9]
    ctx.save_for_backward(*output, *saved)
    # not a saved tensor: it is written between forward and backward, on purpose
    ctx.control = control
    ctx.scalars = inputs[9:]


def _autograd(ctx, dout, dlse, dmass):
    grads = _penalty_attn_backward(dout, ctx.control, *ctx.saved_tensors, *ctx.scalars)
    # q, k, v; then 6 tensors and 9 scalars without gradient
    return (*grads, *(None,) * 15)


penalty_attn.register_autograd(_autograd, setup_context=_setup_context)
