"""cuDNN's attention as torch ships it, made to differentiate lse and sink mass through `out`.

Causal is aligned at the top left, so only self-attention without padding fits; no window, no softcap; bf16 only, as
fp16 has not the range for an adjusted `out`. Where it wins: sm_90 and sm_100 from about 2048 tokens on, where
flash-attn-4 is not installed (bench/NOTES.md).
"""

import torch

from ..types import Backend
from .sink_epilogue import reasons, self_check, vendor
from .sink_epilogue.sequences import is_padded

_forward_op = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward_op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def unsupported_reasons(inputs):
    found = reasons.common(inputs, (torch.bfloat16,), 128, (9, 10))
    if inputs.is_varlen or is_padded(inputs):
        found.append("takes no packed sequences and no padding")
    if inputs.window_size[0] >= 0 or (not inputs.causal and inputs.window_size[1] >= 0):
        found.append(f"knows no window, got {inputs.window_size}")
    if inputs.causal and not inputs.is_varlen and inputs.q.shape[1] != inputs.k.shape[1]:
        found.append(f"aligns causal at the top left, got {inputs.q.shape[1]} rows and {inputs.k.shape[1]} keys")
    return reasons.checked("cudnn", inputs, found)


def _heads_first(x):
    """[B, T, H, D] -> [B, H, T, D]."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _laid_out_as(like, x):
    """x in the strides that torch gives an output of `like`'s shape.

    The operator caches its plans by the strides of q, k and v alone, so out and dout must have the usual ones.
    """
    usual = torch.empty_like(like)
    return x if x.stride() == usual.stride() else usual.copy_(x)


def _attend(problem):
    out, lse, *_ = _forward_op(
        *(_heads_first(x) for x in (problem.q, problem.k, problem.v)),
        None,
        True,
        0.0,
        problem.causal,
        False,
        scale=problem.scale,
    )
    _lse_dims[problem.q.device] = lse.dim()
    return out.transpose(1, 2), lse.flatten(2)


# releases of torch differ in whether the operator's lse is [B, H, T] or [B, H, T, 1], and its backward wants the same
_lse_dims = {}


def _gradients(problem, out, lse, dout, dlse):
    q, k, v = (_heads_first(x) for x in (problem.q, problem.k, problem.v))
    device = q.device
    if device not in _lse_dims:
        _attend(problem)
    # without dropout the random state is not read
    seed, offset = (torch.empty((), dtype=torch.int64, device=device) for _ in range(2))
    grads = _backward_op(
        _laid_out_as(q, dout.transpose(1, 2)),
        q,
        k,
        v,
        _laid_out_as(q, out.transpose(1, 2)),
        lse.contiguous().unsqueeze(-1) if _lse_dims[device] == 4 else lse.contiguous(),
        seed,
        offset,
        None,
        None,
        None,
        problem.max_q,
        problem.max_k,
        0.0,
        problem.causal,
        scale=problem.scale,
    )
    return tuple(x.transpose(1, 2) for x in grads)


def _rows_like(q):
    return torch.empty_like(_heads_first(q)).transpose(1, 2)


KERNEL = vendor.Kernel(_attend, _gradients, top_left=True, rows_like=_rows_like)


def forward(inputs):
    return vendor.forward(inputs, KERNEL)


def backward(inputs, out, lse, stats, dout, dlse, dstats):
    return vendor.backward(inputs, KERNEL, out, lse, stats, dout, dlse, dstats)


BACKEND = self_check.register(
    Backend(
        "cudnn",
        "cuDNN's attention and a sink epilogue, dense bf16, sm_90 and sm_100",
        unsupported_reasons,
        forward,
        backward,
    )
)
