"""FlashAttention-4 (flash-attn-4) and FlashAttention-3's forward (fa3-fwd) with the gathered sink column.

Signatures read from flash-attn-4 4.0.0b36 and fa3-fwd 0.0.3. FA-4's lse carries a gradient; FA-3's does not, and that
package has no backward.
"""

import functools

import torch

from .gather import allow_many_shapes, first_of_row, sink_mass_heads_last, unseen_rows
from .types import Implementation, limits


@functools.lru_cache(maxsize=1)
def _compiled_gather():
    allow_many_shapes()
    return torch.compile(sink_mass_heads_last, dynamic=False)


def _gather(device):
    # their kernels break a graph, so the column is compiled on its own; on a CPU only the tests come here
    return _compiled_gather() if torch.device(device).type == "cuda" else sink_mass_heads_last


def _fa4(case, device):
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

    options = {"softmax_scale": case.softmax_scale, "causal": case.causal, "return_lse": True}
    gather, scale = _gather(device), case.softmax_scale
    if case.kind != "packed":
        window, unseen = (case.left, 0) if case.left >= 0 else (None, None), unseen_rows(case, device)

        def run(q, k, v):
            out, lse = flash_attn_func(q, k, v, window_size=window, **options)
            return {"out": out, "lse": lse, "sink_mass": gather(q, k[:, :1], lse, scale, unseen)}

        return run
    starts, longest = torch.tensor(case.starts, dtype=torch.int32, device=device), max(case.lengths)
    options |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    first = first_of_row(case, device)

    def run_packed(q, k, v):
        out, lse = flash_attn_varlen_func(q, k, v, **options)
        mass = gather(q[None], k[None, first], lse[None], scale)[0]
        return {"out": out, "lse": lse, "sink_mass": mass}

    return run_packed


def _fa3(case, device):
    from fa3_fwd_interface import flash_attn_func

    gather, scale = _gather(device), case.softmax_scale

    def run(q, k, v):
        # what it calls attention probabilities is the lse
        out, lse = flash_attn_func(q, k, v, softmax_scale=scale, causal=case.causal, return_attn_probs=True)
        return {"out": out, "lse": lse, "sink_mass": gather(q, k[:, :1], lse, scale)}

    return run


ENTRIES = [
    Implementation(
        "fa4",
        "FlashAttention-4, lse in autograd, gathered sink column",
        # its backward does not take sm_80
        limits(
            devices=("cuda",),
            kinds=("causal", "full", "window", "packed"),
            dtypes=("bfloat16", "float16"),
            capability=(9, 0),
            package="flash_attn.cute",
        ),
        _fa4,
        # the statistic's share of dk and dq is rounded to bf16 twice, and p (g - g sink_mass) cancels between the two
        factor=8.0,
    ),
    Implementation(
        "fa3_fwd",
        "FlashAttention-3, forward only, gathered sink column",
        # the wheel is built for bf16, without windows
        limits(
            devices=("cuda",),
            kinds=("causal", "full"),
            dtypes=("bfloat16",),
            capability=(9, 0),
            package="fa3_fwd_interface",
        ),
        _fa3,
        backward=False,
    ),
]
