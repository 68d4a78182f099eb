"""Attention maps in memory, as Hugging Face's eager attention makes them: the paper's way.

Written anew from the mathematics: grouped heads repeated, an additive mask made once, softmax in fp32, maps at the
dtype of q.
"""

import torch

from .types import Implementation, limits

KINDS = ("causal", "full", "window", "padded")


def additive_mask(case, device):
    """[1 or B, 1, T, T] at the case's dtype, or None; made outside the timing, as one mask serves all layers."""
    if case.kind == "full":
        return None
    row = torch.arange(case.length, device=device)[:, None]
    key = row.T
    hidden = (key > row)[None]
    if case.left >= 0:
        hidden = hidden | (key < row - case.left)
    if case.kind == "padded":
        used = torch.tensor(case.lengths, device=device)[:, None, None]
        hidden = hidden | (key >= used)
    least = torch.finfo(case.torch_dtype).min
    return torch.zeros(hidden.shape, dtype=case.torch_dtype, device=device).masked_fill_(hidden, least)[:, None]


def attention_maps(q, k, mask, scale):
    """Maps [B, H, T, T] at the dtype of q, from q [B, H, T, D] and k [B, H_kv, T, D]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.matmul(q, k.transpose(-1, -2)) * scale
    if mask is not None:
        s = s + mask
    return torch.softmax(s, -1, dtype=torch.float32).to(q.dtype)


def _build(loop):
    def build(case, device):
        mask = additive_mask(case, device)

        def run(q, k, v):
            maps = attention_maps(q, k, mask, case.softmax_scale)
            out = torch.matmul(maps, v.repeat_interleave(q.shape[1] // v.shape[1], 1))
            if loop:
                rows = torch.stack([maps[:, h, :, 0].float() for h in range(maps.shape[1])], 1)
            else:
                rows = maps[:, :, :, 0].float()
            return {"out": out, "sink_mass": rows}

        return run

    return build


def _entry(name, what, loop):
    return Implementation(name, what, limits(kinds=KINDS), _build(loop), "bhtd_view", exact_statistics=False)


ENTRIES = [
    _entry("paper", "the paper's way: eager attention maps, the statistic head by head as released", loop=True),
    _entry("eager", "the same, written kindly: all heads at once", loop=False),
]
