"""flash_attn_stats_varlen: packed equals one call a sequence equals the fp64 truth."""

import pytest
import surgery_kernels as sk
import torch
from oracle import (
    ALL_STATS,
    Case,
    assert_grads_close,
    assert_rows_close,
    each_alone_and_all,
    grads_of,
    int32,
    named_outputs,
    plain_attention,
)
from surgery_kernels.testing import make_qkv

CPU_BACKENDS = [
    name
    for name, backend in sk.BACKENDS.items()
    if not backend.unsupported_reasons(sk.make_inputs(*(torch.zeros(1, 2, 1, 4),) * 3))
]
by_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
STAT_SUBSETS = [("sink_mass",), ALL_STATS]

# lengths of q, lengths of k, options
PACKS = {
    "self-causal": ((17, 1, 5), (17, 1, 5), {}),
    "self-full": ((17, 1, 5), (17, 1, 5), {"causal": False}),
    "empty-sequences": ((0, 7, 0, 4, 0), (0, 7, 0, 4, 0), {}),
    "no-keys-for-one": ((3, 7), (0, 7), {"causal": False}),
    "no-rows-for-one": ((0, 7), (5, 7), {}),
    "Tq-not-Tk-causal": ((3, 9, 1), (11, 4, 6), {}),
    "Tq-not-Tk-full": ((3, 9, 1), (11, 4, 6), {"causal": False}),
    "window": ((17, 9), (17, 9), {"window": (3, 0)}),
    "window-full-Tq-not-Tk": ((17, 4), (12, 9), {"window": (2, 3), "causal": False}),
    "softcap": ((17, 9), (17, 9), {"softcap": 3.0}),
    "sinks-4-sequence-of-2": ((17, 2), (17, 2), {"sinks": 4}),
    "positions": ((9, 5, 6), (9, 5, 6), {"sinks": ((0, 8), (2, 2), (5, 0))}),
    "positions-beyond-a-short-sequence": ((9, 2), (9, 2), {"sinks": ((0, 8), (8, 1))}),
    "positions-empty-sequence": ((0, 5), (0, 5), {"sinks": ((3,), (2,)), "causal": False}),
    "one-sequence": ((23,), (23,), {}),
    "beyond-a-block": ((300, 20), (300, 20), {"window": (70, 0)}),
}


def starts(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def cases_of(lens_q, lens_k, options):
    """One dense Case of batch size 1 a sequence."""
    sinks = options.get("sinks", 1)
    for b, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        own = sinks if isinstance(sinks, int) else (tuple(s for s in sinks[b] if s < len_k),)
        yield Case("one", batch=1, len_q=len_q, len_k=len_k, **{**options, "sinks": own})


def packed_call(leaves, lens_q, lens_k, options, stats, backend):
    case = Case("packed", **options)
    keep = ("causal", "window_size", "softcap", "softmax_scale", "sinks")
    return sk.flash_attn_stats_varlen(
        *leaves,
        int32(starts(lens_q)),
        int32(starts(lens_k)),
        max(lens_q),
        max(lens_k),
        **{name: value for name, value in case.options().items() if name in keep},
        stats=stats,
        backend=backend,
    )


def packed_qkv(lens_q, lens_k, dtype):
    made = make_qkv(1, sum(lens_q), sum(lens_k), 4, 2, 16, torch.float32, seed=5)
    return [x.detach()[0].to(dtype).requires_grad_() for x in made]


def packed_truth(leaves, lens_q, lens_k, options, stats):
    """name -> packed output, written out sequence by sequence."""
    from_q, from_k = starts(lens_q), starts(lens_k)
    parts = []
    for b, case in enumerate(cases_of(lens_q, lens_k, options)):
        q, k, v = leaves
        of_k = slice(from_k[b], from_k[b + 1])
        if case.len_q and case.len_k:
            part = plain_attention(case, q[None, from_q[b] : from_q[b + 1]], k[None, of_k], v[None, of_k], stats)
        else:
            rows = q.new_zeros(1, q.shape[1], case.len_q)
            part = {"out": q.new_zeros(1, case.len_q, *q.shape[1:]), "lse": rows - float("inf")}
            part |= dict.fromkeys(stats, rows)
        parts.append(part)
    return {name: torch.cat([part[name][0] for part in parts], 0 if name == "out" else 1) for name in parts[0]}


def upstream_of(outputs):
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float64).float().to(x.dtype)
        for name, x in outputs.items()
    }


@by_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("stats", STAT_SUBSETS, ids=["sink_mass", "all-stats"])
@pytest.mark.parametrize("pack", PACKS)
def test_packed_matches_truth(backend, pack, stats, dtype):
    leaves, exact_leaves = packed_qkv(*PACKS[pack][:2], dtype), packed_qkv(*PACKS[pack][:2], torch.float64)
    outputs = named_outputs(packed_call(leaves, *PACKS[pack], stats, backend))
    truth = packed_truth(exact_leaves, *PACKS[pack], stats)
    assert outputs["out"].dtype == dtype and outputs["lse"].dtype == dtype
    for name, output in outputs.items():
        assert output.shape == truth[name].shape and output.is_contiguous()
        assert_rows_close(output, truth[name], name, dtype)
    for label, chosen in each_alone_and_all(outputs, upstream_of(outputs)):
        want = grads_of(truth, exact_leaves, {name: g.double() for name, g in chosen.items()})
        assert_grads_close(grads_of(outputs, leaves, chosen), want, dtype, label)


@by_backend
@pytest.mark.parametrize("stats", STAT_SUBSETS, ids=["sink_mass", "all-stats"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("pack", ["self-causal", "Tq-not-Tk-causal", "positions"])
def test_packed_equals_separate_calls(backend, pack, dtype, stats):
    lens_q, lens_k, options = PACKS[pack]
    leaves = packed_qkv(lens_q, lens_k, dtype)
    packed = named_outputs(packed_call(leaves, lens_q, lens_k, options, stats, backend))
    upstream = upstream_of(packed)
    packed_grads = grads_of(packed, leaves, upstream)
    from_q, from_k = starts(lens_q), starts(lens_k)
    for b, case in enumerate(cases_of(lens_q, lens_k, options)):
        rows = slice(from_q[b], from_q[b + 1])
        slices = (rows, *(slice(from_k[b], from_k[b + 1]),) * 2)
        own = [x.detach()[None, part].requires_grad_() for x, part in zip(leaves, slices, strict=True)]
        one = named_outputs(sk.flash_attn_stats(*own, **case.options(), stats=stats, backend=backend))
        for name, output in one.items():
            whole = packed[name][rows] if name == "out" else packed[name][:, rows]
            torch.testing.assert_close(whole, output[0], rtol=0, atol=0)
        own_upstream = {n: (g[rows] if n == "out" else g[:, rows])[None].contiguous() for n, g in upstream.items()}
        for dx, dx_one, part in zip(packed_grads, grads_of(one, own, own_upstream), slices, strict=True):
            torch.testing.assert_close(dx[part], dx_one[0], rtol=1e-6, atol=1e-6)


@by_backend
def test_packed_sequences_do_not_see_each_other(backend):
    lens_q = lens_k = (9, 6)
    leaves = packed_qkv(lens_q, lens_k, torch.float32)
    first = packed_call(leaves, lens_q, lens_k, {"causal": False}, ALL_STATS, backend)
    changed = [torch.cat([x.detach()[:9], x.detach()[9:] * -3]) for x in leaves]
    second = packed_call(changed, lens_q, lens_k, {"causal": False}, ALL_STATS, backend)
    assert torch.equal(first.out[:9], second.out[:9])
    assert torch.equal(first.lse[:, :9], second.lse[:, :9])
    assert not torch.equal(first.out[9:], second.out[9:])


@by_backend
def test_a_longer_max_seqlen_will_do(backend):
    leaves, cu_seqlens = packed_qkv((5, 4), (5, 4), torch.float32), int32((0, 5, 9))
    tight = sk.flash_attn_stats_varlen(*leaves, cu_seqlens, cu_seqlens, 5, 5, backend=backend)
    loose = sk.flash_attn_stats_varlen(*leaves, cu_seqlens, cu_seqlens, 4096, 4096, backend=backend)
    assert torch.equal(tight.out, loose.out) and torch.equal(tight.lse, loose.lse)


@by_backend
def test_no_sequences_at_all(backend):
    leaves, cu_seqlens = packed_qkv((0,), (0,), torch.float32), int32((0,))
    result = sk.flash_attn_stats_varlen(*leaves, cu_seqlens, cu_seqlens, 0, 0, backend=backend)
    assert result.out.shape == (0, 4, 16) and result.lse.shape == (4, 0)
