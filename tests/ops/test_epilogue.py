"""The CUDA epilogue's own source on a CPU, kernel by kernel, and the way from Python to it."""

from dataclasses import replace

import epilogue_host
import pytest
import surgery_kernels as sk
import torch
from oracle import Case, qkv
from surgery_kernels.backends.sink_epilogue import build, cuda, in_torch, library

from bench import epilogue as bench_epilogue

needs_gxx = pytest.mark.skipif(epilogue_host.GXX is None, reason="g++ is not installed")

CASES = [
    Case("D16", head_dim=16),
    Case("D8-sinks-4", head_dim=8, sinks=4),
    Case("D72", head_dim=72, heads=(3, 1), sinks=2),
    Case("D136-sinks-5", head_dim=136, sinks=5, batch=1),
    Case("D256-sinks-16", head_dim=256, sinks=16, batch=1, heads=(2, 1)),
    Case("two-splits", batch=1, len_q=71, len_k=71, sinks=3),
    Case("positions", sinks=((0, 5, 5), (2, 16, 9)), causal=False),
    Case("positions-leftpad-window", sinks=((0, 2), (1, 3)), leftpad=(4, 9), window=(6, 0)),
    Case("softcap-pads", softcap=5.0, leftpad=(3, 0), used_q=(15, 9), used_k=(13, 17), sinks=3, window=(9, 4)),
    Case("Tq5-Tk19", len_q=5, len_k=19, sinks=2),
    Case("Tq19-Tk5", len_q=19, len_k=5, sinks=2),
]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(case, dtype=torch.float32):
    return sk.make_inputs(*(x.detach() for x in qkv(case, dtype)), **case.options())


def rows_of(inputs):
    """lse with rows that see nothing, g and extra 0 there, as the backends give them."""
    lse = sk.attn_forward(replace(inputs, stats=()), "reference")[1].float()
    blind = lse.isinf()
    return lse, *(randn(*lse.shape, seed=seed).masked_fill(blind, 0.0) for seed in (1, 2)), blind


@needs_gxx
@by_case
def test_sink_mass(case, monkeypatch):
    epilogue_host.install(monkeypatch)
    inputs = inputs_of(case)
    lse = rows_of(inputs)[0]
    keys, sees = in_torch.sinks_of(inputs)
    want = in_torch.sink_mass(inputs, keys, lse, sees)
    torch.testing.assert_close(cuda.sink_mass(inputs, lse), want, rtol=1e-5, atol=1e-6)


@needs_gxx
@by_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_backward_against_torch(case, dtype, monkeypatch):
    """dq, dk and dv, from delta and from out; twice, bit for bit."""
    if dtype != torch.float32 and case.head_dim not in (16, 72, 256):
        pytest.skip("one case a layout")
    epilogue_host.install(monkeypatch)
    inputs = inputs_of(case, dtype)
    lse, g, extra, blind = rows_of(inputs)
    out, dout, dq_in = (randn(*inputs.q.shape, seed=seed).to(dtype) for seed in (3, 4, 5))
    delta = in_torch.delta_of(out, dout, extra)

    wide = replace(inputs, q=inputs.q.float(), k=inputs.k.float(), v=inputs.v.float())
    want = [x.masked_fill(blind.transpose(1, 2)[..., None], 0.0) for x in (dq_in.float(), dout.float())]
    want_dk, want_dv = torch.zeros_like(wide.k), torch.zeros_like(wide.v)
    keys, sees = in_torch.sinks_of(inputs)
    in_torch.add_sink_columns(wide, keys, lse, sees, g - delta, want[1], want[0], want_dk, want_dv)

    runs = []
    for options in ({"delta": delta}, {"out": out, "extra": extra}, {"out": out, "extra": extra}):
        dk, dv = torch.zeros_like(inputs.k), torch.zeros_like(inputs.v)
        dq = cuda.add_sinks(inputs, lse, g, dout, dq_in, dk, dv, **options)
        runs.append((dq, dk, dv))
        for name, got, expected in zip(("dq", "dk", "dv"), runs[-1], (want[0], want_dk, want_dv), strict=True):
            eps = torch.finfo(dtype).eps
            error = (got.float() - expected).abs().max().item()
            assert error <= max(eps, 3e-6) * expected.abs().max().item() + 1e-6, f"{name}: {error:.2e}"
    assert all(torch.equal(*pair) for pair in zip(*runs[1:], strict=True))


@needs_gxx
def test_dq_may_begin_later(monkeypatch):
    """A top-left kernel gave no dq for the rows that see sink keys only; they count as 0. Or there is no dq at all."""
    epilogue_host.install(monkeypatch)
    inputs = inputs_of(Case("T17", sinks=3))
    lse, g, extra, _ = rows_of(inputs)
    dout, dq_in = randn(*inputs.q.shape, seed=4), randn(*inputs.q.shape, seed=5)

    def run(dq, first_row=0):
        grads = torch.zeros_like(inputs.k), torch.zeros_like(inputs.v)
        return cuda.add_sinks(inputs, lse, g, dout, dq, *grads, delta=extra, first_row=first_row)

    whole = dq_in.clone()
    whole[:, :3] = 0.0
    assert torch.equal(run(dq_in[:, 3:].contiguous(), 3), run(whole))
    assert torch.equal(run(None), run(torch.zeros_like(dq_in)))


FOLDS = {
    "ordinary": (1.0, 1.0),
    "tiny-dout": (1e-25, 1.0),
    "zero-dout": (0.0, 1.0),
    "large-extra": (1e-12, 1e4),
    "nothing-to-fold": (0.0, 0.0),
}


@needs_gxx
@pytest.mark.parametrize("implementation", ["torch", "cuda-source"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scales", FOLDS.values(), ids=FOLDS)
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_folded_out_gives_delta(implementation, dtype, scales, head_dim, monkeypatch):
    """rowsum(dout' * out') is delta to twice the dtype's precision, and dout' is 2^-60 where dout was smaller."""
    epilogue_host.install(monkeypatch)
    inputs = inputs_of(Case("fold", head_dim=head_dim, batch=2), dtype)
    out, dout = (randn(*inputs.q.shape, seed=seed).to(dtype) for seed in (3, 4))
    dout = dout * scales[0]
    # a row with one channel only
    dout[:, 2, :, 1:] = 0.0
    extra = randn(*inputs.rows_shape, seed=6) * scales[1]
    want = in_torch.delta_of(out.double(), dout.double(), extra.double())
    if implementation == "torch":
        folded, folded_dout = in_torch.fold_into_out(out, dout, extra)
    else:
        folded, folded_dout = torch.empty_like(out), torch.empty_like(out)
        delta = cuda.fold(inputs, out, dout, extra, folded, folded_dout)
        torch.testing.assert_close(delta.double(), want, rtol=1e-5, atol=1e-5 * max(scales))
    got = (folded.double() * folded_dout.double()).sum(-1).transpose(1, 2)
    # delta itself is a sum in fp32; two bf16 channels leave 2^-8 of 2^-8
    size = (out.double() * dout.double()).abs().sum(-1).transpose(1, 2) + extra.abs()
    unit = 2.0**-16 if dtype == torch.bfloat16 else 2.0**-21
    assert ((got - want).abs() <= unit * size).all()
    assert ((folded != 0).sum(-1) <= 2).all()
    changed = folded_dout != dout
    assert (changed.sum(-1) <= 2).all() and (folded_dout[changed] == in_torch.TINY).all()
    assert (dout[changed].abs() < in_torch.TINY).all()
    assert not folded.isnan().any()


@needs_gxx
@pytest.mark.parametrize(
    "wrong", [{"head_dim": 12}, {"head_dim": 264}, {"n_sinks": 17}, {"dtype": 7}], ids=lambda wrong: next(iter(wrong))
)
def test_library_refuses_what_it_was_not_compiled_for(wrong, monkeypatch):
    epilogue_host.install(monkeypatch)
    inputs = inputs_of(Case("T17"))
    with pytest.raises(RuntimeError, match="dtype, head_dim or n_sinks out of range"):
        cuda._call("forward", inputs, {"q": inputs.q, "k": inputs.k}, {}, {}, **wrong)


@needs_gxx
def test_fp16_is_not_folded(monkeypatch):
    epilogue_host.install(monkeypatch)
    inputs = inputs_of(Case("T17"), torch.float16)
    x = torch.zeros_like(inputs.q)
    with pytest.raises(RuntimeError, match="out of range"):
        cuda.fold(inputs, x, x, torch.zeros(inputs.rows_shape), x, x)


@needs_gxx
def test_unaligned_tensors_are_copied(monkeypatch):
    epilogue_host.install(monkeypatch)
    inputs = inputs_of(Case("T17", head_dim=24))
    lse = rows_of(inputs)[0]
    memory = torch.zeros(inputs.q.numel() + 1)
    shifted = memory[1:].view(inputs.q.shape).copy_(inputs.q)
    assert shifted.data_ptr() % 16
    want = cuda.sink_mass(inputs, lse)
    assert torch.equal(cuda.sink_mass(replace(inputs, q=shifted), lse), want)


def test_rows_per_block_depends_on_the_problem_only():
    assert cuda.rows_per_block(4, 8, 4096) == 128
    assert cuda.rows_per_block(1, 1, 100) == 32
    assert cuda.rows_per_block(64, 8, 4096) == 256


def test_structs_of_both_sides_have_one_size():
    """params.h and its twin in Python; a field of one side only would shift every later one."""
    assert library.ctypes.sizeof(library.TensorRef) == 32
    text = (build.source_folder() / "params.h").read_text()
    body = text[text.index("struct SinkParams") :]
    positions = [body.index(f"{name}") for name in ("TensorRef q,", "rows_batch,", "batch, len_q", "scale, softcap")]
    assert positions == sorted(positions)
    if epilogue_host.GXX is not None:
        assert epilogue_host.host_library().surgery_params_size() == library.ctypes.sizeof(library.SinkParams)


def test_library_of_another_version_is_refused(monkeypatch, tmp_path):
    class Other:
        def __getattr__(self, name):
            return type("f", (), {"__call__": lambda self: 8})()

    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: Other())
    with pytest.raises(build.BuildError, match="another version: its struct has 8 bytes"):
        library.open_library(tmp_path / "old.so")


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    exists = build.Path.exists
    monkeypatch.setattr(build.Path, "exists", lambda path: path.name != "nvcc" and exists(path))
    library.load.cache_clear()
    library.reason_against.cache_clear()
    yield
    library.load.cache_clear()
    library.reason_against.cache_clear()


def test_without_nvcc_the_torch_epilogue_serves_and_says_so(no_nvcc, caplog):
    with caplog.at_level("WARNING", "surgery_kernels"):
        assert library.reason_against(90) == library.reason_against(90) == "nvcc is not installed (CUDA_HOME, PATH)"
    assert len(caplog.records) == 1 and "the torch one serves" in caplog.text


def test_building_at_first_use_can_be_forbidden(monkeypatch, tmp_path):
    monkeypatch.setenv("SURGERY_BUILD_CUDA", "0")
    library.load.cache_clear()
    with pytest.raises(build.BuildError, match="SURGERY_BUILD_CUDA=0"):
        library.load(90)


def test_missing_sources_are_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "__file__", str(tmp_path / "a" / "b" / "c" / "d" / "e" / "build.py"))
    with pytest.raises(build.BuildError, match="not installed"):
        build.source_folder()


def test_cpu_tensors_never_reach_the_library(monkeypatch):
    monkeypatch.setattr(library, "load", lambda arch: pytest.fail("loaded"))
    assert not cuda.can_run(inputs_of(Case("T17")))


@needs_gxx
def test_timed_kernels_are_the_ones_of_the_backends(monkeypatch):
    launched = epilogue_host.install(monkeypatch)
    inputs = inputs_of(Case("T17"), torch.bfloat16)
    for run in bench_epilogue.kernels_of(inputs).values():
        run()
    assert launched == ["forward", "fold", "backward", "backward"]
