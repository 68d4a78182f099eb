"""FlashAttention-4 (distribution flash-attn-4), whose backward takes an lse gradient, and a sink epilogue.

Causal and windows are aligned at the bottom right; GQA, softcap and packed sequences are native. Where it wins: sm_90
and sm_100 from about 2048 tokens on (bench/NOTES.md). On sm_80 it has no backward.
"""

import torch

from ..types import Backend
from .sink_epilogue import reasons, self_check, vendor


def unsupported_reasons(inputs):
    found = reasons.common(inputs, (torch.bfloat16, torch.float16), 256, (9, 10), softcap=True)
    if reasons.installed("flash-attn-4") is None:
        found.append("flash-attn-4 is not installed")
    return reasons.checked("fa4", inputs, found)


def _options(problem):
    left, right = (None if side < 0 else side for side in problem.window)
    return {
        "softmax_scale": problem.scale,
        "causal": problem.causal,
        "softcap": problem.softcap,
        "window_size_left": left,
        "window_size_right": None if problem.causal else right,
        "cu_seqlens_q": problem.cu_q,
        "cu_seqlens_k": problem.cu_k,
        "max_seqlen_q": problem.max_q,
        "max_seqlen_k": problem.max_k,
    }


def _attend(problem):
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(problem.q, problem.k, problem.v, return_lse=True, **_options(problem))
    return out, lse


def _gradients(problem, out, lse, dout, dlse):
    from flash_attn.cute.interface import _flash_attn_bwd

    return _flash_attn_bwd(
        problem.q,
        problem.k,
        problem.v,
        out,
        dout,
        lse.contiguous(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dlse=None if dlse is None else dlse.contiguous(),
        **_options(problem),
    )


KERNEL = vendor.Kernel(_attend, _gradients, takes_dlse=True)


def forward(inputs):
    return vendor.forward(inputs, KERNEL)


def backward(inputs, out, lse, stats, dout, dlse, dstats):
    return vendor.backward(inputs, KERNEL, out, lse, stats, dout, dlse, dstats)


BACKEND = self_check.register(
    Backend(
        "fa4",
        "FlashAttention-4 and a sink epilogue, bf16 and fp16, sm_90 and sm_100",
        unsupported_reasons,
        forward,
        backward,
    )
)
