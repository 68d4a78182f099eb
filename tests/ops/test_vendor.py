"""The vendor backends' mathematics on a CPU: doubles of the kernels, everything around them as it is."""

from dataclasses import replace

import epilogue_host
import pytest
import surgery_kernels as sk
import torch
import vendor_doubles
from oracle import (
    Case,
    assert_grads_close,
    assert_rows_close,
    grad_outputs,
    grads_of,
    plain_attention,
    qkv,
    truth_of,
    visible_and_sinks,
)
from surgery_kernels.backends import cudnn, flash
from surgery_kernels.backends.sink_epilogue import cuda
from surgery_kernels.backends.sink_epilogue.sequences import problem_of
from surgery_kernels.testing import assert_no_worse_than_baseline
from test_flash_attn_stats import CASES, LOW_PRECISION, PADDING

STATS = ("sink_mass",)
OUTPUTS = ("out", "lse", "sink_mass")
by_vendor = pytest.mark.parametrize("vendor", vendor_doubles.VENDORS)


def make(case, dtype, rounded_to=None):
    leaves = [x.detach() for x in qkv(case, dtype, rounded_to)]
    return sk.make_inputs(*leaves, **case.options(), stats=STATS)


def upstream_of(case, dtype, rounded_to=None):
    made = grad_outputs(case, dtype, rounded_to)
    return {name: made[name] for name in OUTPUTS}


def each_alone_and_all(upstream):
    for name in upstream:
        yield name, {name: upstream[name]}
    yield "all", upstream
    yield "rows", {name: g for name, g in upstream.items() if name != "out"}


def backward(vendor, inputs, outputs, chosen):
    out, lse, stats = outputs
    mass = chosen.get("sink_mass")
    return sk.attn_backward(
        inputs, out, lse, stats, chosen.get("out"), chosen.get("lse"), None if mass is None else mass[None], vendor
    )


def check(vendor, case, dtype):
    inputs = make(case, dtype, torch.float32)
    out, lse, stats = outputs = sk.attn_forward(inputs, vendor)
    truth = truth_of(case, torch.float32)
    for name, got in zip(OUTPUTS, (out, lse, stats[0]), strict=True):
        assert got.is_contiguous()
        assert_rows_close(got, truth.outputs[name], name, dtype)
    for label, chosen in each_alone_and_all(upstream_of(case, dtype, torch.float32)):
        grads = backward(vendor, inputs, outputs, chosen)
        assert all(x.is_contiguous() for x in grads)
        assert_grads_close(grads, truth.grads(chosen), dtype, label)


@by_vendor
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_truth_in_fp64(vendor, case, monkeypatch):
    against = vendor_doubles.reasons_but_the_machine(vendor, make(case, torch.float64))
    if against:
        pytest.skip("; ".join(against))
    vendor_doubles.install(monkeypatch, vendor)
    check(vendor, case, torch.float64)


EPILOGUES = pytest.mark.parametrize("epilogue", ["torch", "cuda-source"])


def install(monkeypatch, vendor, epilogue):
    """The vendor's double, and for `cuda-source` the kernels of csrc/ compiled for the CPU; their launches."""
    vendor_doubles.install(monkeypatch, vendor)
    if epilogue == "torch":
        return None
    if epilogue_host.GXX is None:
        pytest.skip("g++ is not installed")
    return epilogue_host.install(monkeypatch)


def skip_unsupported(vendor, case):
    against = vendor_doubles.reasons_but_the_machine(vendor, make(case, torch.float32))
    if against:
        pytest.skip("; ".join(against))


FP32 = [
    *(case for case in CASES if case.name in ("T17-causal", "T17-full", "T63-causal", "H4/1", "D24", "D80", "sinks-4")),
    *(case for case in CASES if case.name in ("Tq5-Tk19-causal", "Tq19-Tk5-causal", "sinks-4-sequence-of-2")),
    *(case for case in CASES if case.name in ("bothpads-causal", "bothpads-full", "no-real-key-causal", "softcap-5")),
    *(case for case in CASES if case.name in ("window-4-0", "window-3-2-full", "window-bothpads", "sinks-4-leftpad")),
    Case("D128-sinks-16", batch=1, head_dim=128, sinks=16, len_q=33, len_k=33, heads=(2, 1)),
    Case("D192-sinks-3", batch=1, head_dim=192, sinks=3, len_q=33, len_k=33, heads=(2, 1)),
]  # fmt: skip


@by_vendor
@EPILOGUES
@pytest.mark.parametrize("case", FP32, ids=lambda case: case.name)
def test_matches_truth_in_fp32(vendor, epilogue, case, monkeypatch):
    skip_unsupported(vendor, case)
    launched = install(monkeypatch, vendor, epilogue)
    check(vendor, case, torch.float32)
    if launched is not None:
        assert set(launched) == {"forward", "backward"} | ({"fold"} if vendor != "fa4" else set())


def halves(vendor):
    return (torch.bfloat16, torch.float16) if vendor == "fa4" else (torch.bfloat16,)


HALVES = pytest.mark.parametrize(
    ("vendor", "dtype"),
    [(vendor, dtype) for vendor in vendor_doubles.VENDORS for dtype in halves(vendor)],
    ids=lambda x: str(x).removeprefix("torch."),
)
NO_POSITIONS = [case for case in LOW_PRECISION if isinstance(case.sinks, int)]


def assert_within_twice_plain(got, want, low, name):
    if want.any():
        assert_no_worse_than_baseline(got, want, low, name=name)
    else:
        # folding into a dout of 0 leaves a trace of 1e-18 in dv
        assert got.abs().max() <= 1e-15


@HALVES
@EPILOGUES
@pytest.mark.parametrize("case", NO_POSITIONS, ids=lambda case: case.name)
def test_half_precision_no_worse_than_plain_torch(vendor, dtype, epilogue, case, monkeypatch):
    skip_unsupported(vendor, case)
    install(monkeypatch, vendor, epilogue)
    inputs, truth = make(case, dtype), truth_of(case, dtype)
    out, lse, stats = outputs = sk.attn_forward(inputs, vendor)
    plain_leaves = qkv(case, dtype)
    plain = plain_attention(case, *plain_leaves, STATS)
    assert_within_twice_plain(out, truth.outputs["out"].detach(), plain["out"], "out")
    # aten's bf16 exp is good to 6e-5
    assert_rows_close(lse, truth.outputs["lse"], "lse", atol=1e-4)
    assert_rows_close(stats[0], truth.outputs["sink_mass"], "sink_mass")
    for label, chosen in each_alone_and_all(upstream_of(case, dtype)):
        low = grads_of(plain, plain_leaves, {n: g.to(plain[n].dtype) for n, g in chosen.items()})
        for name, *three in zip(
            ("dq", "dk", "dv"), backward(vendor, inputs, outputs, chosen), truth.grads(chosen), low, strict=True
        ):
            assert_within_twice_plain(*three, f"{name} from {label}")


@HALVES
@EPILOGUES
@pytest.mark.parametrize("names", [("out", "sink_mass"), ("sink_mass",)], ids="+".join)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_half_precision_gradient_of_a_strong_sink(vendor, dtype, epilogue, names, causal, monkeypatch):
    """Masses near 1, where p (g - g sink_mass) cancels. A kernel that is shown the sink keys loses this."""
    install(monkeypatch, vendor, epilogue)
    case = Case("strong-sink", batch=1, len_q=64, len_k=64, heads=(2, 2), head_dim=32, causal=causal)

    def leaves_of(to):
        q, k, v = (x.detach().double() for x in qkv(case, dtype))
        k[:, 0] *= 0.25
        k[:, 0, :, 0], q[..., 0] = 12.0, 5.0
        return tuple(x.to(dtype).to(to).requires_grad_() for x in (q, k, v))

    upstream = {name: grad_outputs(case, dtype)[name] for name in names}
    exact_leaves, low_leaves = leaves_of(torch.float64), leaves_of(dtype)
    exact, low = plain_attention(case, *exact_leaves), plain_attention(case, *low_leaves)
    assert exact["sink_mass"].mean() > 0.9
    inputs = sk.make_inputs(*(x.detach() for x in leaves_of(dtype)), **case.options(), stats=STATS)
    outputs = sk.attn_forward(inputs, vendor)
    want = grads_of(exact, exact_leaves, {name: g.double() for name, g in upstream.items()})
    base = grads_of(low, low_leaves, {name: g.to(dtype) for name, g in upstream.items()})
    got = backward(vendor, inputs, outputs, upstream)
    for name, *three in zip(("dq", "dk"), got[:2], want[:2], base[:2], strict=True):
        assert_no_worse_than_baseline(*three, name=name)


def packed(case, lengths, dtype):
    """(packed AttnInputs, leaves of each sequence, Case of each) of sequences of (rows, keys) `lengths`."""
    cases = [replace(case, name="one", batch=1, len_q=rows, len_k=keys) for rows, keys in lengths]
    leaves = [qkv(one, torch.float64, torch.float32) for one in cases]
    q, k, v = (torch.cat([x[i][0].detach() for x in leaves]).to(dtype) for i in range(3))
    starts = [torch.tensor([0, *x], dtype=torch.int32).cumsum(0).int() for x in zip(*lengths, strict=True)]
    longest = [max(x) for x in zip(*lengths, strict=True)]
    options = {name: x for name, x in case.options().items() if "used" not in name and "left" not in name}
    inputs = sk.make_inputs(
        q, k, v, **options, stats=STATS, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1],
        max_seqlen_q=longest[0], max_seqlen_k=longest[1],
    )  # fmt: skip
    return inputs, leaves, cases


@pytest.mark.parametrize("vendor", ["fa4", "flash"])
@EPILOGUES
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("window", [(-1, -1), (3, 2)], ids=["all", "window"])
def test_packed_equals_separate(vendor, epilogue, causal, window, monkeypatch):
    """Sequences without rows, without keys, and shorter than the sinks among them."""
    install(monkeypatch, vendor, epilogue)
    case = Case("packed", causal=causal, window=window, sinks=3)
    lengths = ((17, 17), (1, 1), (0, 4), (9, 20), (5, 0), (2, 2), (40, 33))
    dtype = torch.float32
    inputs, leaves, cases = packed(case, lengths, dtype)
    outputs = sk.attn_forward(inputs, vendor)
    generator = torch.Generator().manual_seed(5)
    g_out = torch.randn(inputs.q.shape, generator=generator)
    g_rows = torch.randn((2, *inputs.rows_shape), generator=generator)
    grads = backward(vendor, inputs, outputs, {"out": g_out, "lse": g_rows[0], "sink_mass": g_rows[1]})
    for of_q, of_k, index in _slices(lengths):
        truth = plain_attention(cases[index], *leaves[index], STATS)
        got = dict(zip(OUTPUTS, (outputs[0][of_q], outputs[1][:, of_q], outputs[2][0][:, of_q]), strict=True))
        upstream = {"out": g_out[of_q], "lse": g_rows[0][:, of_q], "sink_mass": g_rows[1][:, of_q]}
        for name in OUTPUTS:
            assert_rows_close(got[name], truth[name][0], name)
        want = grads_of(truth, leaves[index], {name: g[None].double() for name, g in upstream.items()})
        pieces = [x[of][None] for x, of in zip(grads, (of_q, of_k, of_k), strict=True)]
        assert_grads_close(pieces, want, dtype, f"sequence {index}")


def _slices(lengths):
    row = key = 0
    for index, (rows, keys) in enumerate(lengths):
        yield slice(row, row + rows), slice(key, key + keys), index
        row, key = row + rows, key + keys


@by_vendor
@EPILOGUES
@pytest.mark.parametrize("size", [None, 0.0, 1e-30, 1e-19, 1e-17, 1e4], ids="dout{}".format)
def test_dout_of_any_size_beside_statistic_gradients(vendor, epilogue, size, monkeypatch):
    """In the last layer of a probe pass dout is 0, or there is none; some rows of it may be, too."""
    install(monkeypatch, vendor, epilogue)
    case = Case("T17")
    inputs, truth = make(case, torch.float32, torch.float32), truth_of(case, torch.float32)
    outputs = sk.attn_forward(inputs, vendor)
    upstream = upstream_of(case, torch.float32, torch.float32)
    dout = upstream.pop("out")
    if size is not None:
        upstream["out"] = dout * size
        # a single channel, and none
        upstream["out"][:, 3, :, 1:] = 0.0
        upstream["out"][:, ::4] = 0.0
    before = {name: g.clone() for name, g in upstream.items()}
    assert_grads_close(
        backward(vendor, inputs, outputs, upstream), truth.grads(upstream), torch.float32, f"dout * {size}"
    )
    assert all(torch.equal(g, before[name]) for name, g in upstream.items())


@pytest.mark.parametrize("vendor", ["fa4", "flash"])
@EPILOGUES
@pytest.mark.parametrize("case", PADDING[:6], ids=lambda case: case.name)
def test_padding_content_and_nan_gradients_change_nothing(vendor, epilogue, case, monkeypatch):
    """Garbage in padded rows and keys, and nan as the gradient of a blind row's statistics, reach nobody."""
    install(monkeypatch, vendor, epilogue)
    inputs = make(case, torch.float32)
    outputs = sk.attn_forward(inputs, vendor)
    upstream = upstream_of(case, torch.float32)
    clean = backward(vendor, inputs, outputs, upstream)
    seen = torch.stack([visible_and_sinks(case, b)[0] for b in range(case.batch)])
    hidden = (~seen.any(2), ~seen.any(1), ~seen.any(1))
    assert hidden[0].any() or hidden[1].any()
    for x, mask, value in zip((inputs.q, inputs.k, inputs.v), hidden, (1e4, -1e4, 1e6), strict=True):
        x[mask] = value
    redone = sk.attn_forward(inputs, vendor)
    for first, second in zip(outputs, redone, strict=True):
        assert torch.equal(first, second)
    for name in ("lse", "sink_mass"):
        upstream[name] = upstream[name].masked_fill(hidden[0][:, None], float("nan"))
    for got, want, mask in zip(backward(vendor, inputs, redone, upstream), clean, hidden, strict=True):
        assert (got[mask] == 0).all()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@by_vendor
@EPILOGUES
@pytest.mark.parametrize("layout", ["heads-first", "every-second-row", "last-dim-strided"])
def test_any_memory_layout(vendor, epilogue, layout, monkeypatch):
    install(monkeypatch, vendor, epilogue)
    layouts = {
        "heads-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every-second-row": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        "last-dim-strided": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    }
    case = Case("T17", sinks=2)
    inputs, truth = make(case, torch.float32, torch.float32), truth_of(case, torch.float32)
    inputs = replace(inputs, **{name: layouts[layout](getattr(inputs, name)) for name in ("q", "k", "v")})
    assert not inputs.q.is_contiguous()
    outputs = sk.attn_forward(inputs, vendor)
    upstream = upstream_of(case, torch.float32, torch.float32)
    upstream["out"] = layouts[layout](upstream["out"])
    got = backward(vendor, inputs, outputs, upstream)
    assert all(x.is_contiguous() for x in (*outputs, *got))
    assert_grads_close(got, truth.grads(upstream), torch.float32, layout)


@pytest.mark.parametrize("lse_dims", [3, 4])
def test_cudnn_backward_gets_the_lse_that_its_forward_gave(lse_dims, monkeypatch):
    """Releases of torch differ; and a backward may run in a process that ran no forward."""
    vendor_doubles.install(monkeypatch, "cudnn", lse_dims)
    case = Case("T17")
    inputs = make(case, torch.float64, torch.float32)
    outputs = sk.attn_forward(inputs, "cudnn")
    cudnn._lse_dims.clear()
    upstream = upstream_of(case, torch.float64, torch.float32)
    want = truth_of(case, torch.float32).grads(upstream)
    assert_grads_close(backward("cudnn", inputs, outputs, upstream), want, torch.float64, "all")


def test_without_statistics_the_kernel_gets_out_as_it_is(monkeypatch):
    double = vendor_doubles.install(monkeypatch, "flash")
    case = Case("T17")
    inputs = replace(make(case, torch.float64, torch.float32), stats=())
    out, lse, stats = sk.attn_forward(inputs, "flash")
    upstream = {"out": grad_outputs(case, torch.float64, torch.float32)["out"]}
    grads = sk.attn_backward(inputs, out, lse, stats, upstream["out"], None, None, "flash")
    assert double.seen_out is out
    assert_grads_close(grads, truth_of(case, torch.float32).grads(upstream), torch.float64, "out")


@pytest.mark.parametrize("vendor", ["cudnn", "flash"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", ["dense", "packed", "padded", "window"])
def test_operators_of_this_torch_take_our_arguments(vendor, causal, layout):
    """The real operators on tensors without memory: names, order and optional arguments, and the shapes they give."""
    module = {"cudnn": cudnn, "flash": flash}[vendor]
    if vendor == "cudnn" and layout != "dense":
        pytest.skip("dense only")
    meta = {"device": "meta", "dtype": torch.bfloat16}
    lead = (40,) if layout == "packed" else (2, 20)
    inputs = sk.AttnInputs(
        *(torch.empty(*lead, n, 16, **meta) for n in (4, 2, 2)),
        0.25,
        causal,
        (3, -1) if layout == "window" else (-1, -1),
        max_seqlen_q=20,
        max_seqlen_k=20,
    )
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    if layout == "packed":
        inputs = replace(inputs, cu_seqlens_q=starts, cu_seqlens_k=starts)
    if layout == "padded":
        inputs = replace(inputs, leftpad_k=starts[:2], seqused_q=starts[:2], seqused_k=starts[:2])
    problem = problem_of(inputs, hide_sinks=True, top_left=vendor == "cudnn")
    out, lse = module.KERNEL.attend(problem)
    assert out.shape == problem.q.shape
    heads, rows = problem.q.shape[-2], problem.q.shape[-3]
    assert lse.shape == ((heads, rows) if problem.cu_q is not None else (2, heads, rows))
    grads = module.KERNEL.gradients(problem, out, lse, torch.empty_like(out), None)
    assert [x.shape for x in grads] == [x.shape for x in (problem.q, problem.k, problem.v)]


def moved(inputs, device):
    """AttnInputs with every tensor on `device`."""
    fields = {name: x.to(device) for name, x in vars(inputs).items() if isinstance(x, torch.Tensor)}
    return replace(inputs, **fields)


GPU_CASES = [
    *NO_POSITIONS,
    Case("T1000-D128", batch=2, len_q=1000, len_k=1000, heads=(8, 2), head_dim=128, sinks=4),
    Case("T513-D64-full", batch=2, len_q=513, len_k=513, heads=(4, 4), head_dim=64, causal=False),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@HALVES
@pytest.mark.parametrize("epilogue", ["torch", "cuda"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_on_a_gpu_no_worse_than_plain_torch(vendor, dtype, epilogue, case, monkeypatch):
    """The vendor's kernel itself, with the compiled epilogue and with torch's."""
    inputs = moved(make(case, dtype), "cuda")
    against = sk.BACKENDS[vendor].unsupported_reasons(inputs)
    if against:
        pytest.skip("; ".join(against))
    if epilogue == "torch":
        monkeypatch.setattr(cuda, "can_run", lambda inputs: False)
    elif not cuda.can_run(inputs):
        pytest.skip("no CUDA epilogue")
    truth = truth_of(case, dtype)
    out, lse, stats = outputs = sk.attn_forward(inputs, vendor)
    plain_leaves = qkv(case, dtype)
    plain = plain_attention(case, *plain_leaves, STATS)
    assert_within_twice_plain(out.cpu(), truth.outputs["out"].detach(), plain["out"], "out")
    assert_rows_close(lse.cpu(), truth.outputs["lse"], "lse", atol=1e-4)
    assert_rows_close(stats[0].cpu(), truth.outputs["sink_mass"], "sink_mass")
    for label, chosen in each_alone_and_all(upstream_of(case, dtype)):
        low = grads_of(plain, plain_leaves, {n: g.to(plain[n].dtype) for n, g in chosen.items()})
        got = backward(vendor, inputs, outputs, {name: g.cuda() for name, g in chosen.items()})
        for name, grad, *two in zip(("dq", "dk", "dv"), got, truth.grads(chosen), low, strict=True):
            assert_within_twice_plain(grad.cpu(), *two, f"{name} from {label}")
