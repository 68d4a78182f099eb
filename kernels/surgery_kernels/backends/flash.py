"""torch's own FlashAttention-2 for CUDA, made to differentiate lse and sink mass through `out`.

Causal and windows are aligned at the bottom right, GQA is native, packed sequences may be empty. There is no softcap,
no left padding (sink_epilogue.sequences makes it packed sequences), and bf16 only: fp16 has not the range for an
adjusted `out`. Where it wins: sm_80, from about 2048 tokens on (bench/NOTES.md).
"""

import torch

from ..types import Backend
from .sink_epilogue import reasons, self_check, vendor

_forward_op = torch.ops.aten._flash_attention_forward
_backward_op = torch.ops.aten._flash_attention_backward


def unsupported_reasons(inputs):
    found = reasons.common(inputs, (torch.bfloat16,), 256, (8, 9, 10, 12))
    return reasons.checked("flash", inputs, found)


def _window(problem):
    """The operator's window: None is unbounded, and pure causal is a flag of its own."""
    left, right = problem.window
    bounds = (None, None) if problem.causal else (left, right)
    return {
        name: None if bound is None or bound < 0 else bound
        for name, bound in zip(("window_size_left", "window_size_right"), bounds, strict=True)
    }


def _attend(problem):
    out, lse, *_ = _forward_op(
        *(_last_contiguous(x) for x in (problem.q, problem.k, problem.v)),
        problem.cu_q,
        problem.cu_k,
        problem.max_q,
        problem.max_k,
        0.0,
        problem.causal,
        False,
        scale=problem.scale,
        **_window(problem),
    )
    return out, lse


def _gradients(problem, out, lse, dout, dlse):
    # without dropout the random state is not read
    unused = torch.empty(2, dtype=torch.int64, device=out.device)
    return _backward_op(
        dout,
        *(_last_contiguous(x) for x in (problem.q, problem.k, problem.v)),
        out,
        lse.contiguous(),
        problem.cu_q,
        problem.cu_k,
        problem.max_q,
        problem.max_k,
        0.0,
        problem.causal,
        unused,
        unused,
        scale=problem.scale,
        **_window(problem),
    )


def _last_contiguous(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_like(q):
    return q.new_empty(q.shape)


KERNEL = vendor.Kernel(_attend, _gradients, blind_lse=float("inf"), rows_like=_rows_like)


def forward(inputs):
    return vendor.forward(inputs, KERNEL)


def backward(inputs, out, lse, stats, dout, dlse, dstats):
    return vendor.backward(inputs, KERNEL, out, lse, stats, dout, dlse, dstats)


BACKEND = self_check.register(
    Backend(
        "flash",
        "torch's FlashAttention-2 and a sink epilogue, bf16, sm_80 and newer",
        unsupported_reasons,
        forward,
        backward,
    )
)
