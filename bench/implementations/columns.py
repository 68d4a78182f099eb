"""Column mass, the attention each key receives: ours, attention maps, and PyPI's flash-colsum."""

import surgery_kernels as sk
import torch

from . import eager
from .ours import keywords
from .types import Implementation, limits

KINDS = ("causal", "full", "window", "padded")


def _ours(case, device):
    options = keywords(case, device)

    def run(q, k, v):
        inputs = sk.make_inputs(q, k, v, stats=(), **options)
        _, lse, _ = sk.attn_forward(inputs, sk.choose_backend(inputs))
        return {"column_mass": sk.column_mass(inputs, lse)}

    return run


def _maps(case, device):
    mask = eager.additive_mask(case, device)

    def run(q, k, v):
        maps = eager.attention_maps(q, k, mask, case.softmax_scale)
        if case.kind == "padded":
            maps = maps * real[:, None, :, None]
        return {"column_mass": maps.sum(2, dtype=torch.float32)}

    used = torch.tensor(case.lengths, device=device)[:, None]
    real = torch.arange(case.length, device=device) < used
    return run


def _flash_colsum(case, device):
    from flash_colsum import flash_colsum

    def run(q, k, v):
        # one key head a query head; its causal kernel takes one sequence at a time
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        if not case.causal:
            return {"column_mean": flash_colsum(q, k, scale=case.softmax_scale)}
        each = [
            flash_colsum(q[b : b + 1], k[b : b + 1], scale=case.softmax_scale, is_causal=True) for b in range(len(q))
        ]
        return {"column_mean": torch.cat(each)}

    return run


def _entry(name, what, supported, build, layout="bthd", **options):
    return Implementation(name, what, supported, build, layout, "column_mass", backward=False, **options)


ENTRIES = [
    _entry("ours_columns", "our forward, then our column kernel", limits(kinds=KINDS), _ours),
    _entry(
        "eager_columns",
        "attention maps, summed over rows",
        limits(kinds=KINDS),
        _maps,
        "bhtd_view",
        exact_statistics=False,
    ),
    _entry(
        "flash_colsum",
        "flash-colsum 0.1.0: the mean over heads and rows in two passes; reads 64 channels of a head only",
        limits(devices=("cuda",), kinds=("causal", "full"), package="flash_colsum"),
        _flash_colsum,
        "bhtd",
    ),
]
