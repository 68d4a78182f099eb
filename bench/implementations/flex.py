"""FlexAttention with its differentiable lse and the gathered sink column, compiled as one graph.

The natural way to the statistic in torch alone. The block mask is made outside the timing. On a CPU it has neither lse
nor backward.
"""

import functools

import torch

from .gather import allow_many_shapes, first_of_row, sink_mass_heads_first, unseen_rows
from .types import Implementation, limits


def mask_mod(case, device):
    """Which key a row sees, or None for all of them."""
    if case.kind == "full":
        return None
    # plain numbers and tensors only: these functions are compiled
    if case.kind == "packed":
        owner = first_of_row(case, device)
        return lambda b, h, i, j: (i >= j) & (owner[i] == owner[j])
    if case.kind == "padded":
        used = torch.tensor(case.lengths, device=device)
        return lambda b, h, i, j: (i >= j) & (i < used[b])
    if case.kind == "window":
        left = case.left
        return lambda b, h, i, j: (i >= j) & (i - j <= left)
    return lambda b, h, i, j: i >= j


@functools.lru_cache(maxsize=8)
def block_mask(case, device):
    from torch.nn.attention.flex_attention import create_block_mask

    visible = mask_mod(case, device)
    if visible is None:
        return None
    rows = case.starts[-1] if case.kind == "packed" else case.length
    batch = case.batch if case.kind == "padded" else None
    make = torch.compile(create_block_mask) if device.startswith("cuda") else create_block_mask
    return make(visible, batch, None, rows, rows, device=device)


def attention_of(case, device):
    """The function to compile: q, k, v heads first -> results."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    mask = block_mask(case, device)
    packed = case.kind == "packed"
    first = first_of_row(case, device) if packed else None
    unseen = unseen_rows(case, device)
    grouped, scale = case.heads.heads != case.heads.kv_heads, case.softmax_scale
    padded = case.kind == "padded"

    def run(q, k, v):
        if packed:
            q, k, v = q[None], k[None], v[None]
        out, aux = flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            enable_gqa=grouped,
            return_aux=AuxRequest(lse=True),
        )
        lse = aux.lse
        if padded:
            # rows beyond the end see nothing: their mass must be exp(-inf) and not exp(inf)
            lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        k_sink = k[:, :, first] if packed else k[:, :, :1]
        sink_mass = sink_mass_heads_first(q, k_sink, lse, scale, unseen)
        if packed:
            out, sink_mass = out[0], sink_mass[0]
        return {"out": out, "sink_mass": sink_mass}

    return run


def _build(mode):
    def build(case, device):
        allow_many_shapes()
        return torch.compile(attention_of(case, str(device)), dynamic=False, fullgraph=True, mode=mode)

    return build


SUPPORTED = limits(devices=("cuda",), kinds=("causal", "full", "window", "packed", "padded"))
ENTRIES = [
    Implementation(
        "flex",
        "FlexAttention, compiled with its lse gradient and the gathered sink column",
        SUPPORTED,
        _build(None),
        "bhtd",
    ),
    Implementation(
        "flex_autotuned",
        "the same with max-autotune; minutes of compilation a case",
        SUPPORTED,
        _build("max-autotune-no-cudagraphs"),
        "bhtd",
        default=False,
    ),
]
