"""Our backends with sink mass and, for the price of the statistic, without any."""

import surgery_kernels as sk
import torch

from .types import Implementation


def keywords(case, device):
    """Arguments of `flash_attn_stats` (packed: of `flash_attn_stats_varlen`) for a case."""

    def int32(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    options = {"causal": case.causal, "window_size": (case.left, -1), "softmax_scale": case.softmax_scale}
    if case.kind == "packed":
        for side in ("q", "k"):
            options |= {f"cu_seqlens_{side}": int32(case.starts), f"max_seqlen_{side}": max(case.lengths)}
    if case.kind == "padded":
        options |= {"seqused_q": int32(case.lengths), "seqused_k": int32(case.lengths)}
    return options


def _reasons(backend, stats):
    def reasons(case, device):
        heads = case.heads
        shape = (1,) if case.kind == "packed" else (1, 1)
        q = torch.empty(*shape, heads.heads, heads.head_dim, dtype=case.torch_dtype, device=device)
        k = q[..., : heads.kv_heads, :]
        inputs = sk.make_inputs(q, k, k, stats=stats, **(_one_row(device) if case.kind == "packed" else {}))
        return sk.BACKENDS[backend].unsupported_reasons(inputs)

    return reasons


def _one_row(device):
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    return {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 1, "max_seqlen_k": 1}


def _build(backend, stats):
    def build(case, device):
        attend = sk.flash_attn_stats_varlen if case.kind == "packed" else sk.flash_attn_stats
        options = {**keywords(case, device), "stats": stats, "backend": backend}

        def run(q, k, v):
            result = attend(q, k, v, **options)
            return {"out": result.out, "lse": result.lse, **result.stats}

        return run

    return build


def _entry(backend, stats):
    name, what = f"ours_{backend}", sk.BACKENDS[backend].description
    if not stats:
        name, what = f"{name}_off", f"the same without a statistic: {what}"
    # the oracle is slow and checked by the tests
    default = backend != "reference"
    return Implementation(name, what, _reasons(backend, stats), _build(backend, stats), default=default)


ENTRIES = [_entry(backend, stats) for backend in sk.BACKENDS for stats in (("sink_mass",), ())]
