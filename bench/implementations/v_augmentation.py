"""V-augmentation: v grows by a channel that is 1 at the sink key, and out by one that is the sink mass.

Exact with any attention kernel, at the price of a larger head dim (8 channels more, for alignment) and of a mass that
is rounded like out. FlashAttention-2 wants one head dim for q, k and v, so there all three grow.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from . import sdpa
from .types import Implementation, limits

CHANNELS = 8


def _build(backend, grow_all):
    def build(case, device):
        heads = case.heads
        marks = torch.zeros(case.batch, heads.kv_heads, case.length, CHANNELS, dtype=case.torch_dtype, device=device)
        marks[:, :, 0, 0] = 1
        grouped = sdpa.takes_groups(case, device, backend)

        def run(q, k, v):
            if grow_all:
                # zeros add nothing to a score
                q, k = F.pad(q, (0, CHANNELS)), F.pad(k, (0, CHANNELS))
            out = sdpa.attend(q, k, torch.cat((v, marks), -1), case, backend, grouped)
            return {"out": out[..., : heads.head_dim], "sink_mass": out[..., heads.head_dim].float()}

        return run

    return build


def _entry(name, what, supported, backend, grow_all=False):
    return Implementation(name, what, supported, _build(backend, grow_all), "bhtd_view", exact_statistics=False)


ENTRIES = [
    _entry("vaug", "V-augmentation on torch's own choice", limits(devices=("cpu",), kinds=sdpa.KINDS), None, True),
    _entry(
        "vaug_flash",
        "V-augmentation on FlashAttention-2",
        limits(devices=("cuda",), kinds=sdpa.KINDS, dtypes=sdpa.HALF, capability=(8, 0)),
        SDPBackend.FLASH_ATTENTION,
        True,
    ),
    _entry(
        "vaug_efficient",
        "V-augmentation on memory-efficient attention",
        limits(devices=("cuda",), kinds=sdpa.KINDS),
        SDPBackend.EFFICIENT_ATTENTION,
    ),
    _entry(
        "vaug_cudnn",
        "V-augmentation on cuDNN",
        limits(devices=("cuda",), kinds=sdpa.KINDS, dtypes=sdpa.HALF, capability=(8, 0)),
        SDPBackend.CUDNN_ATTENTION,
    ),
]
