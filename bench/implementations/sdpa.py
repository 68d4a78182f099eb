"""torch's scaled_dot_product_attention, which has no statistic: what attention alone costs."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from .types import Implementation, limits

HALF = ("bfloat16", "float16")
KINDS = ("causal", "full")


def takes_groups(case, device, backend):
    """Whether the kernel takes fewer key heads than query heads; else k and v are repeated, at its expense."""
    heads = case.heads
    if heads.heads == heads.kv_heads or backend == SDPBackend.EFFICIENT_ATTENTION:
        return False
    if backend != SDPBackend.CUDNN_ATTENTION:
        return True
    q, k = (
        torch.empty(1, n, case.length, heads.head_dim, dtype=case.torch_dtype, device=device)
        for n in (heads.heads, heads.kv_heads)
    )
    return can_use_cudnn_attention(SDPAParams(q, k, k, None, 0.0, case.causal, True))


def attend(q, k, v, case, backend=None, grouped=True):
    """out [B, H, T, D_v]; q [B, H, T, D], k [B, H_kv, T, D], v [B, H_kv, T, D_v]."""
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, scale=case.softmax_scale, enable_gqa=grouped
        )


def _build(backend):
    def build(case, device):
        grouped = takes_groups(case, device, backend)
        return lambda q, k, v: {"out": attend(q, k, v, case, backend, grouped)}

    return build


ENTRIES = [
    Implementation(
        "sdpa", "torch's own choice, no statistic", limits(devices=("cpu",), kinds=KINDS), _build(None), "bhtd_view"
    ),
    Implementation(
        "sdpa_flash",
        "FlashAttention-2 in torch, no statistic",
        limits(devices=("cuda",), kinds=KINDS, dtypes=HALF, capability=(8, 0)),
        _build(SDPBackend.FLASH_ATTENTION),
        "bhtd_view",
    ),
    Implementation(
        "sdpa_efficient",
        "memory-efficient attention in torch, no statistic",
        limits(devices=("cuda",), kinds=KINDS),
        _build(SDPBackend.EFFICIENT_ATTENTION),
        "bhtd_view",
    ),
    Implementation(
        "sdpa_cudnn",
        "cuDNN in torch, no statistic",
        limits(devices=("cuda",), kinds=KINDS, dtypes=HALF, capability=(8, 0)),
        _build(SDPBackend.CUDNN_ATTENTION),
        "bhtd_view",
    ),
]
