"""flash_attn_stats against the fp64 truth: every backend, every mask feature, the gradient of every output alone."""

from dataclasses import replace

import pytest
import surgery_kernels as sk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    ALL_STATS,
    ROWS_TOLERANCE,
    Case,
    assert_grads_close,
    assert_rows_close,
    each_alone_and_all,
    grad_outputs,
    grads_of,
    named_outputs,
    plain_attention,
    qkv,
    truth_of,
    visible_and_sinks,
)
from surgery_kernels.testing import assert_no_worse_than_baseline

CPU_BACKENDS = [
    name
    for name, backend in sk.BACKENDS.items()
    if not backend.unsupported_reasons(sk.make_inputs(*(torch.zeros(1, 2, 1, 4),) * 3))
]
# the cpu backend has one path for the first two and another for the rest
STAT_SUBSETS = [(), ("sink_mass",), ALL_STATS]
EACH_STAT = [(name,) for name in ALL_STATS]

LENGTHS = [
    Case("T1-causal", len_q=1, len_k=1),
    Case("T1-full", len_q=1, len_k=1, causal=False),
    Case("T17-causal"),
    Case("T17-full", causal=False),
    Case("T63-causal", len_q=63, len_k=63),
    Case("T63-full", len_q=63, len_k=63, causal=False),
    Case("T100-causal", len_q=100, len_k=100),
    Case("B1-T257-causal", batch=1, len_q=257, len_k=257),
    Case("B1-T257-full", batch=1, len_q=257, len_k=257, causal=False),
    Case("Tq5-Tk19-causal", len_q=5, len_k=19),
    Case("Tq5-Tk19-full", len_q=5, len_k=19, causal=False),
    Case("Tq19-Tk5-causal", len_q=19, len_k=5),
    Case("Tq19-Tk5-full", len_q=19, len_k=5, causal=False),
    Case("Tq1-Tk100-causal", len_q=1, len_k=100),
    Case("B1-Tq257-Tk300-causal", batch=1, len_q=257, len_k=300),
    Case("B1-Tq300-Tk257-causal", batch=1, len_q=300, len_k=257),
]
HEADS = [
    Case("H4/4", heads=(4, 4)),
    Case("H4/1", heads=(4, 1)),
    Case("H4/1-full", heads=(4, 1), causal=False),
    Case("H4/2-T63-full", heads=(4, 2), len_q=63, len_k=63, causal=False),
    Case("H1/1", heads=(1, 1)),
    Case("D24", head_dim=24),
    Case("D40", head_dim=40),
    Case("D80", head_dim=80),
    Case("D96", head_dim=96, heads=(4, 1)),
    Case("D1", head_dim=1),
]
PADDING = [
    Case("leftpad-causal", batch=3, leftpad=(0, 5, 16)),
    Case("leftpad-full", batch=3, leftpad=(0, 5, 16), causal=False),
    Case("rightpad-causal", batch=3, used_q=(17, 9, 1), used_k=(17, 9, 1)),
    Case("rightpad-full", batch=3, used_q=(17, 9, 1), used_k=(17, 9, 1), causal=False),
    Case("bothpads-causal", batch=3, leftpad=(3, 0, 7), used_q=(17, 12, 10), used_k=(17, 12, 10)),
    Case("bothpads-full", batch=3, leftpad=(3, 0, 7), used_q=(17, 12, 10), used_k=(17, 12, 10), causal=False),
    Case("seqused_k-only-causal", used_k=(17, 8)),
    Case("seqused_q-only-causal", used_q=(17, 8)),
    Case("seqused_q-only-full", used_q=(17, 8), causal=False),
    Case("seqused-differ", len_q=11, len_k=23, used_q=(7, 11), used_k=(23, 9)),
    Case("no-real-key-causal", batch=3, used_q=(17, 0, 17), used_k=(17, 0, 17), leftpad=(0, 0, 17)),
    Case("no-real-key-full", batch=3, used_q=(17, 4, 17), used_k=(17, 0, 17), leftpad=(0, 0, 17), causal=False),
    Case("leftpad-beyond-seqused", used_q=(17, 6), used_k=(17, 6), leftpad=(0, 9)),
    Case("nobody-sees-anything", used_q=(0, 0), used_k=(0, 0)),
    Case("B1-T700-leftpad600", batch=1, len_q=700, len_k=700, heads=(1, 1), leftpad=(600,)),
    Case("B1-T700-leftpad600-full", batch=1, len_q=700, len_k=700, heads=(1, 1), leftpad=(600,), causal=False),
]
WINDOWS = [
    Case("window-4-0", window=(4, 0)),
    Case("window-4-inf-causal", window=(4, -1)),
    Case("window-0-0", window=(0, 0)),
    Case("window-0-0-full", window=(0, 0), causal=False),
    Case("window-3-2-full", window=(3, 2), causal=False),
    Case("window-inf-2-full", window=(-1, 2), causal=False),
    Case("window-inf-0-full", window=(-1, 0), causal=False),
    Case("window-3-inf-full", window=(3, -1), causal=False),
    Case("causal-wins-over-right", window=(4, 3)),
    Case("window-one-short-of-all", window=(15, -1)),
    Case("window-just-all", window=(16, -1)),
    Case("window-wider-than-all", window=(99, 99), causal=False),
    Case("window-Tq5-Tk19", len_q=5, len_k=19, window=(3, -1)),
    Case("window-Tq19-Tk5-full", len_q=19, len_k=5, window=(3, 1), causal=False),
    Case("window-bothpads", batch=3, window=(3, -1), leftpad=(3, 0, 7), used_q=(17, 12, 10), used_k=(17, 12, 10)),
    Case("window-bothpads-full", window=(2, 3), causal=False, leftpad=(3, 0), used_q=(15, 9), used_k=(13, 17)),
    Case("B1-T300-window-20", batch=1, len_q=300, len_k=300, window=(20, 0)),
    Case("T600-window-7-9-pads", len_q=600, len_k=600, heads=(1, 1), window=(7, 9), causal=False,
         leftpad=(0, 290), used_q=(600, 500), used_k=(560, 555)),
]  # fmt: skip
SOFTCAPS = [
    Case("softcap-5", softcap=5.0),
    Case("softcap-1-full", softcap=1.0, causal=False),
    Case("softcap-5-window-leftpad", softcap=5.0, window=(6, 0), leftpad=(0, 4)),
    Case("scale-0.05", scale=0.05),
    Case("scale-2-full", scale=2.0, causal=False),
    Case("scale-negative-causal", scale=-0.3),
    Case("scale-negative-leftpad-full", scale=-0.3, causal=False, leftpad=(0, 4)),
    Case("scale-zero-causal", scale=0.0),
]
SINKS = [
    Case("sinks-0", sinks=0),
    Case("sinks-4", sinks=4),
    Case("sinks-4-full", sinks=4, causal=False),
    Case("sinks-are-all-keys", sinks=17),
    Case("sinks-4-leftpad", sinks=4, leftpad=(0, 6)),
    Case("sinks-4-sequence-of-2", sinks=4, used_q=(17, 2), used_k=(17, 2)),
    Case("sinks-4-sequence-of-2-leftpad", sinks=4, leftpad=(0, 15)),
    Case("sinks-4-window", sinks=4, window=(5, 0)),
    Case("positions", sinks=((0, 5), (2, 16))),
    Case("positions-full", sinks=((0, 5), (2, 16)), causal=False),
    Case("positions-duplicated", sinks=((3, 3, 3), (0, 7, 0))),
    Case("positions-duplicated-full", sinks=((3, 3, 3), (0, 7, 0)), causal=False, heads=(4, 1)),
    Case("positions-leftpad", sinks=((0, 2), (1, 3)), leftpad=(4, 9)),
    Case("positions-beyond-the-sequence", sinks=((0, 12), (1, 3)), leftpad=(8, 0), used_q=(17, 3), used_k=(17, 3)),
    Case("positions-window-full", sinks=((8,), (2,)), window=(3, 2), causal=False),
    Case("positions-none", sinks=((), ())),
    Case("positions-Tq5-Tk19", len_q=5, len_k=19, sinks=((18, 0), (14, 14))),
]
CASES = [*LENGTHS, *HEADS, *PADDING, *WINDOWS, *SOFTCAPS, *SINKS]

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


def subset_id(stats):
    return "+".join(stats) if len(stats) < len(ALL_STATS) else "all-stats"


def run(case, backend, dtype, stats, rounded_to=None):
    """(leaves, name -> output) of `flash_attn_stats`."""
    leaves = qkv(case, dtype, rounded_to)
    result = sk.flash_attn_stats(*leaves, **case.options(), stats=stats, backend=backend)
    assert tuple(result.stats) == stats
    return leaves, named_outputs(result)


def check(case, backend, dtype, stats):
    """Outputs and the gradient of each output, alone and together."""
    truth = truth_of(case, torch.float32)
    leaves, outputs = run(case, backend, dtype, stats, rounded_to=torch.float32)
    for name, output in outputs.items():
        assert_rows_close(output, truth.outputs[name], name, dtype)
    upstream = grad_outputs(case, dtype, torch.float32)
    for label, chosen in each_alone_and_all(outputs, upstream):
        assert_grads_close(grads_of(outputs, leaves, chosen), truth.grads(chosen), dtype, label)


@by_name
@by_backend
@pytest.mark.parametrize("stats", STAT_SUBSETS, ids=subset_id)
def test_matches_truth_in_fp64(backend, case, stats):
    check(case, backend, torch.float64, stats)


@by_name
@by_backend
@pytest.mark.parametrize("stats", STAT_SUBSETS[1:], ids=subset_id)
def test_matches_truth_in_fp32(backend, case, stats):
    check(case, backend, torch.float32, stats)


@by_backend
@pytest.mark.parametrize("stats", [*EACH_STAT, ("max_logit", "sink_mass")], ids="+".join)
@pytest.mark.parametrize("case", [LENGTHS[2], PADDING[4], WINDOWS[4]], ids=lambda case: case.name)
def test_any_subset_in_any_order(backend, case, stats):
    check(case, backend, torch.float64, stats)


@st.composite
def problems(draw):
    batch = draw(st.integers(1, 3))
    len_q, len_k = draw(st.integers(1, 12)), draw(st.integers(1, 12))

    def lengths(low, high):
        return st.none() | st.tuples(*[st.integers(low, high)] * batch)

    n = draw(st.integers(0, 3))
    position = st.tuples(*[st.integers(0, len_k - 1)] * n)
    return Case(
        "drawn",
        batch=batch,
        len_q=len_q,
        len_k=len_k,
        heads=draw(st.sampled_from([(1, 1), (2, 1), (2, 2)])),
        head_dim=4,
        causal=draw(st.booleans()),
        window=(draw(st.integers(-1, 13)), draw(st.integers(-1, 13))),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        sinks=draw(st.integers(0, len_k) | st.tuples(*[position] * batch)),
        leftpad=draw(lengths(0, len_k)),
        used_q=draw(lengths(0, len_q)),
        used_k=draw(lengths(0, len_k)),
    )


@by_backend
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=problems(), stats=st.sampled_from(STAT_SUBSETS[1:]))
def test_any_drawn_problem_matches_truth(backend, case, stats):
    check(case, backend, torch.float64, stats)


def test_rows_that_see_nothing_are_zero():
    """The truth itself: out 0, lse -inf, statistics 0, as the docstring promises."""
    case = next(case for case in PADDING if case.name == "no-real-key-causal")
    outputs = truth_of(case, torch.float32).outputs
    blind = ~torch.stack([visible_and_sinks(case, b)[0].any(-1) for b in range(case.batch)])
    assert blind.sum() == 34
    assert (outputs["out"][blind] == 0).all()
    assert (outputs["lse"].transpose(1, 2)[blind] == float("-inf")).all()
    assert all((outputs[name].transpose(1, 2)[blind] == 0).all() for name in ALL_STATS)


@by_backend
@pytest.mark.parametrize("stats", STAT_SUBSETS[1:], ids=subset_id)
@pytest.mark.parametrize("case", PADDING[:6], ids=lambda case: case.name)
def test_padding_content_changes_nothing(backend, case, stats):
    """Garbage in padded rows and keys reaches no output and gets a gradient of exactly 0."""
    leaves, outputs = run(case, backend, torch.float32, stats)
    seen = torch.stack([visible_and_sinks(case, b)[0] for b in range(case.batch)])
    blind_rows, unseen_keys = ~seen.any(2), ~seen.any(1)
    assert blind_rows.any() or unseen_keys.any()
    dirty = [x.detach().clone() for x in leaves]
    dirty[0][blind_rows] = 1e4
    dirty[1][unseen_keys] = -1e4
    dirty[2][unseen_keys] = 1e6
    dirty = [x.requires_grad_() for x in dirty]
    redone = named_outputs(sk.flash_attn_stats(*dirty, **case.options(), stats=stats, backend=backend))
    for name, output in outputs.items():
        torch.testing.assert_close(redone[name], output, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    upstream = {name: grad_outputs(case, torch.float32)[name] for name in outputs}
    clean, soiled = grads_of(outputs, leaves, upstream), grads_of(redone, dirty, upstream)
    for dx_clean, dx, hidden in zip(clean, soiled, (blind_rows, unseen_keys, unseen_keys), strict=True):
        assert (dx[hidden] == 0).all()
        torch.testing.assert_close(dx, dx_clean, rtol=1e-4, atol=1e-5)


@by_backend
@pytest.mark.parametrize("stats", STAT_SUBSETS[1:], ids=subset_id)
def test_nan_gradient_of_a_blind_row_is_ignored(backend, stats):
    """log(sink_mass) of a row that sees no key has an infinite gradient, which times a row mask of 0 is nan."""
    case = next(case for case in PADDING if case.name == "bothpads-causal")
    leaves, outputs = run(case, backend, torch.float32, stats)
    blind = (outputs["lse"] == float("-inf")).detach()
    upstream = {name: grad_outputs(case, torch.float32)[name] for name in outputs if name != "out"}
    want = truth_of(case, torch.float32).grads(upstream)
    soiled = {name: g.masked_fill(blind, float("nan")) for name, g in upstream.items()}
    assert_grads_close(grads_of(outputs, leaves, soiled), want, torch.float32, "rows")


@by_backend
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("stats", STAT_SUBSETS[1:], ids=subset_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-19, 1e-17, 1e-9, 1e4], ids="dout{}".format)
def test_dout_of_any_size_beside_statistic_gradients(backend, causal, stats, dtype, size):
    """The last layer of a probe pass has dout 0 and a statistic gradient; folding must survive any ratio."""
    case = Case("T17", causal=causal, leftpad=(0, 3))
    truth = truth_of(case, torch.float32)
    leaves, outputs = run(case, backend, dtype, stats, rounded_to=torch.float32)
    upstream = {name: grad_outputs(case, dtype, torch.float32)[name] for name in outputs}
    upstream["out"] = upstream["out"] * size
    assert_grads_close(grads_of(outputs, leaves, upstream), truth.grads(upstream), dtype, f"dout * {size}")


@by_backend
@pytest.mark.parametrize("size", [1e-22, 1e-21, 1e-19, 3e-19, 6e-19, 3e-18], ids="dout{}".format)
def test_folding_stays_in_the_range_of_fp32(backend, size):
    """Regression: extra / |dout|^2 overflowed to nan for a barely non-zero dout beside scaled-up row gradients."""
    case = Case("T17", leftpad=(0, 3))
    leaves, outputs = run(case, backend, torch.float32, ("sink_mass",))
    upstream = {name: grad_outputs(case, torch.float32)[name] for name in outputs}
    upstream = {name: g * (size if name == "out" else 1e4) for name, g in upstream.items()}
    want = truth_of(case, torch.float32).grads(upstream)
    assert_grads_close(grads_of(outputs, leaves, upstream), want, torch.float32, "scaled gradients")


@by_backend
@pytest.mark.parametrize("stats", STAT_SUBSETS[1:], ids=subset_id)
def test_dout_zero_on_some_rows_only(backend, stats):
    case = Case("T63", len_q=63, len_k=63)
    truth = truth_of(case, torch.float32)
    leaves, outputs = run(case, backend, torch.float32, stats)
    upstream = {name: grad_outputs(case, torch.float32)[name] for name in outputs}
    upstream["out"][:, ::3] = 0.0
    upstream["out"][0, :, 1] = 0.0
    assert_grads_close(grads_of(outputs, leaves, upstream), truth.grads(upstream), torch.float32, "some rows")


@by_backend
@pytest.mark.parametrize("stats", STAT_SUBSETS, ids=subset_id)
def test_backward_leaves_the_incoming_gradients_alone(backend, stats):
    """Regression: folding wrote into dout, which raises for the expanded gradient of a plain out.sum()."""
    case = Case("T17")
    leaves, outputs = run(case, backend, torch.float64, stats, rounded_to=torch.float32)
    upstream = {name: torch.ones((), dtype=torch.float64).expand(output.shape) for name, output in outputs.items()}
    want = truth_of(case, torch.float32).grads(upstream)
    assert_grads_close(grads_of(outputs, leaves, upstream), want, torch.float64, "expanded gradients")

    mine = {name: grad_outputs(case, torch.float64)[name] for name in outputs}
    mine["out"][:, 3] = 0.0
    before = {name: (g.clone(), g._version) for name, g in mine.items()}
    grads_of(outputs, leaves, mine)
    for name, g in mine.items():
        assert torch.equal(g, before[name][0]) and g._version == before[name][1], name


@by_backend
@pytest.mark.parametrize("stats", STAT_SUBSETS[1:], ids=subset_id)
@pytest.mark.parametrize("layout", ["last-dim-strided", "heads-first", "every-second-row", "expanded-heads"])
def test_any_memory_layout(backend, stats, layout):
    """Regression: aten's kernel assumes a last stride of 1 and computed garbage for anything else."""
    case = Case("T17", heads=(4, 4))
    layouts = {
        "last-dim-strided": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "heads-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every-second-row": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        "expanded-heads": lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
    }
    leaves = qkv(case, torch.float64, torch.float32)
    strided = [layouts[layout](x.detach()).requires_grad_() for x in leaves]
    assert not any(x.is_contiguous() for x in strided)
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in strided]
    want = plain_attention(case, *plain)
    got = named_outputs(sk.flash_attn_stats(*strided, **case.options(), stats=stats, backend=backend))
    for name, output in got.items():
        assert output.is_contiguous(), name
        assert_rows_close(output, want[name], name, torch.float64)
    upstream = {name: grad_outputs(case, torch.float64)[name] for name in got}
    upstream["out"] = layouts[layout](upstream["out"]) if layout != "expanded-heads" else upstream["out"]
    dx = grads_of(got, strided, upstream)
    assert_grads_close(dx, grads_of(want, plain, upstream), torch.float64, layout)


@by_backend
@pytest.mark.parametrize("stats", STAT_SUBSETS[1:], ids=subset_id)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)], ids="B{0[0]}-Tq{0[1]}-Tk{0[2]}".format)
def test_empty_dimensions(backend, stats, causal, sizes):
    batch, len_q, len_k = sizes
    leaves = qkv(Case("empty", batch=batch, len_q=len_q, len_k=len_k), torch.float32)
    result = sk.flash_attn_stats(*leaves, causal=causal, stats=stats, backend=backend)
    assert result.out.shape == (batch, len_q, 4, 16) and (result.out == 0).all()
    for rows, value in ((result.lse, float("-inf")), *((rows, 0.0) for rows in result.stats.values())):
        assert rows.shape == (batch, 4, len_q) and (rows == value).all()
    outputs = named_outputs(result)
    for leaf, dx in zip(
        leaves, grads_of(outputs, leaves, {n: torch.ones_like(x) for n, x in outputs.items()}), strict=True
    ):
        assert dx.shape == leaf.shape and (dx == 0).all()


LOW_PRECISION = [
    LENGTHS[2],
    LENGTHS[3],
    LENGTHS[6],
    Case("B1-T257-D80", batch=1, len_q=257, len_k=257, head_dim=80),
    HEADS[1],
    PADDING[0],
    PADDING[4],
    PADDING[5],
    PADDING[11],
    WINDOWS[14],
    SOFTCAPS[2],
    SINKS[1],
    SINKS[10],
]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@by_backend
@HALVES
@pytest.mark.parametrize("stats", STAT_SUBSETS[1:], ids=subset_id)
@pytest.mark.parametrize("case", LOW_PRECISION, ids=lambda case: case.name)
def test_half_precision_no_worse_than_plain_torch(backend, dtype, stats, case):
    """out and gradients by the 2x rule; lse and statistics as exact as in fp32, given the rounded inputs."""
    truth = truth_of(case, dtype)
    leaves, outputs = run(case, backend, dtype, stats)
    plain_leaves = qkv(case, dtype)
    plain = plain_attention(case, *plain_leaves, stats)
    assert_no_worse_than_baseline(outputs["out"], truth.outputs["out"].detach(), plain["out"], name="out")
    for name in ("lse", *stats):
        # aten's bf16 exp is good to 6e-5, so is lse; as an error of p that is what rtol allows the statistics
        atol = 1e-4 if name == "lse" else None
        assert_rows_close(outputs[name], truth.outputs[name], name, atol=atol)
    upstream = grad_outputs(case, dtype)
    for label, chosen in each_alone_and_all(outputs, upstream):
        exact = truth.grads(chosen)
        baseline = grads_of(plain, plain_leaves, {n: g.to(plain[n].dtype) for n, g in chosen.items()})
        for name, got, want, low in zip(
            ("dq", "dk", "dv"), grads_of(outputs, leaves, chosen), exact, baseline, strict=True
        ):
            assert got.dtype == dtype
            if want.any():
                assert_no_worse_than_baseline(got, want, low, name=f"{name} from {label}")
            else:
                # folding with a dout of 0 leaves a trace of 1e-18 in dv
                assert got.abs().max() <= 1e-15


@by_backend
@pytest.mark.parametrize("with_dout", [True, False], ids=["dout", "no-dout"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_bf16_gradient_of_a_strong_sink(backend, causal, with_dout):
    """Real sink heads have masses near 1, where p (g - g sink_mass) cancels: any bias of delta shows up in full."""
    case = Case("strong-sink", batch=1, len_q=64, len_k=64, heads=(2, 2), head_dim=32, causal=causal)

    def leaves_of(dtype):
        q, k, v = (x.detach().to(torch.float64) for x in qkv(case, torch.bfloat16))
        k[:, 0] *= 0.25
        k[:, 0, :, 0], q[..., 0] = 12.0, 5.0
        return tuple(x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v))

    names = ("out", "sink_mass") if with_dout else ("sink_mass",)
    upstream = {name: grad_outputs(case, torch.bfloat16)[name] for name in names}
    exact_leaves, low_leaves, leaves = leaves_of(torch.float64), leaves_of(torch.bfloat16), leaves_of(torch.bfloat16)
    exact = plain_attention(case, *exact_leaves)
    assert exact["sink_mass"].mean() > 0.9
    outputs = named_outputs(sk.flash_attn_stats(*leaves, **case.options(), backend=backend))
    assert_rows_close(outputs["sink_mass"], exact["sink_mass"], "sink_mass")
    want = grads_of(exact, exact_leaves, {name: g.double() for name, g in upstream.items()})
    low = grads_of(plain_attention(case, *low_leaves), low_leaves, {n: g.bfloat16() for n, g in upstream.items()})
    for name, got, true, base in zip(
        ("dq", "dk"), grads_of(outputs, leaves, upstream)[:2], want[:2], low[:2], strict=True
    ):
        assert_no_worse_than_baseline(got, true, base, name=name)


@by_backend
def test_no_gradient_asked_for_none_computed(backend):
    """Only q needs a gradient: dk and dv stay None, and detached inputs give detached outputs."""
    q, k, v = (x.detach() for x in qkv(Case("T17"), torch.float32))
    assert not sk.flash_attn_stats(q, k, v, backend=backend).out.requires_grad
    q.requires_grad_()
    sk.flash_attn_stats(q, k, v, backend=backend).stats["sink_mass"].sum().backward()
    assert q.grad is not None and k.grad is None and v.grad is None


@by_backend
def test_forward_and_backward_repeat_bit_for_bit(backend):
    case = replace(PADDING[4], name="repeat")
    upstream = grad_outputs(case, torch.float32)
    runs = []
    for _ in range(2):
        leaves, outputs = run(case, backend, torch.float32, ALL_STATS)
        runs.append([*outputs.values(), *grads_of(outputs, leaves, upstream)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_poisoned_memory_is_nan():
    """The net under all tests here: what the package allocates without writing is nan."""
    scope = {"__name__": "surgery_kernels.somewhere", "torch": torch}
    exec("made = [torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(2).new_empty(4)]", scope)
    assert all(made.isnan().all() for made in scope["made"])


def test_tolerances_can_tell_a_wrong_edge():
    """One key more or less in the window moves every row by far more than any tolerance used here."""
    narrow, wide = (truth_of(Case("w", window=(left, 0)), torch.float32).outputs for left in (4, 5))
    for name in ("out", "lse", *ALL_STATS):
        moved = (narrow[name] - wide[name]).abs().max()
        assert moved > 1e3 * ROWS_TOLERANCE[torch.float32]["atol"], name
