"""surgery::attn_stats as a PyTorch operator: opcheck, torch.compile, autocast, dtypes, no second derivatives."""

import pytest
import surgery_kernels as sk
import torch
from oracle import ALL_STATS, Case, grads_of, int32, named_outputs, qkv
from surgery_kernels.ops import run

CPU_BACKENDS = [
    name
    for name, backend in sk.BACKENDS.items()
    if not backend.unsupported_reasons(sk.make_inputs(*(torch.zeros(1, 2, 1, 4),) * 3))
]
by_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)

OP_CASES = {
    "causal": {},
    "gqa-padding": {"leftpad_k": int32([0, 2]), "seqused_q": int32([7, 5]), "seqused_k": int32([7, 5])},
    "all-stats-window-softcap": {"stats": ALL_STATS, "window_size": (2, 1), "causal": False, "softcap": 3.0},
    "positions": {"sinks": int32([[0, 3], [5, 5]]), "stats": ("entropy", "sink_mass")},
    "no-stats": {"stats": (), "sinks": 0},
}


def op_arguments(inputs, backend, monkeypatch):
    """The flat arguments that `ops.run` hands to the registered operator."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr("surgery_kernels.ops._attn_stats", lambda *args: seen.append(args))
        run(inputs, backend)
    return seen[0]


def opcheck(inputs, backend, monkeypatch):
    report = torch.library.opcheck(
        torch.ops.surgery.attn_stats.default, op_arguments(inputs, backend, monkeypatch), raise_exception=False
    )
    assert len(report) == 4 and set(report.values()) == {"SUCCESS"}, report


@by_backend
@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck(backend, name, monkeypatch):
    leaves = qkv(Case("op", len_q=7, len_k=7, head_dim=8), torch.float32)
    opcheck(sk.make_inputs(*leaves, **OP_CASES[name]), backend, monkeypatch)


@by_backend
def test_opcheck_packed(backend, monkeypatch):
    leaves = [x.detach()[0].requires_grad_() for x in qkv(Case("op", batch=1, head_dim=8), torch.float32)]
    cu_seqlens = int32([0, 6, 6, 17])
    inputs = sk.make_inputs(*leaves, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=11, max_seqlen_k=11)
    opcheck(inputs, backend, monkeypatch)


@by_backend
def test_opcheck_strided_bf16(backend, monkeypatch):
    leaves = qkv(Case("op", len_q=7, len_k=7, head_dim=8), torch.bfloat16)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves]
    opcheck(sk.make_inputs(*strided), backend, monkeypatch)


def loss_of(q, k, v, **options):
    """One scalar through every output, with a row mask as the regulariser has."""
    result = sk.flash_attn_stats(q, k, v, **options)
    rows = torch.arange(q.shape[1]) > 0
    lse = result.lse.masked_fill(result.lse == float("-inf"), 0.0)
    return (result.out.float() ** 2).sum() + sum((x * rows).sin().mean() for x in (lse, *result.stats.values()))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "options",
    [{}, {"stats": ALL_STATS, "window_size": (5, -1), "leftpad_k": int32([0, 4])}],
    ids=["default", "all-stats-window-leftpad"],
)
def test_compiled_equals_eager(options):
    leaves = qkv(Case("T17"), torch.float32)
    eager = loss_of(*leaves, **options)
    compiled = torch.compile(loss_of, fullgraph=True)(*leaves, **options)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    want, got = torch.autograd.grad(eager, leaves), torch.autograd.grad(compiled, leaves)
    for dx, dx_want in zip(got, want, strict=True):
        torch.testing.assert_close(dx, dx_want, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_with_dynamic_shapes():
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (17, 33, 9):
        leaves = qkv(Case("dynamic", len_q=length, len_k=length), torch.float32)
        eager, traced = loss_of(*leaves), compiled(*leaves)
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)
        for dx, dx_want in zip(torch.autograd.grad(traced, leaves), torch.autograd.grad(eager, leaves), strict=True):
            torch.testing.assert_close(dx, dx_want, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@by_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("stats", [("sink_mass",), ALL_STATS], ids=["sink_mass", "all-stats"])
def test_autocast_casts_inputs_and_keeps_fp32_leaves(backend, dtype, stats):
    leaves = qkv(Case("T17"), torch.float32)
    with torch.autocast("cpu", dtype):
        result = sk.flash_attn_stats(*leaves, stats=stats, backend=backend)
        loss = result.out.float().sum() + result.lse.sum() + sum(x.sum() for x in result.stats.values())
    assert result.out.dtype == dtype and result.lse.dtype == torch.float32
    assert all(rows.dtype == torch.float32 for rows in result.stats.values())
    rounded = [x.detach().to(dtype).requires_grad_() for x in leaves]
    plain = sk.flash_attn_stats(*rounded, stats=stats, backend=backend)
    assert torch.equal(plain.out, result.out) and torch.equal(plain.lse, result.lse)
    for dx in torch.autograd.grad(loss, leaves):
        assert dx.dtype == torch.float32 and dx.isfinite().all() and dx.any()


@by_backend
def test_autocast_leaves_fp64_alone(backend):
    leaves = qkv(Case("T17"), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        result = sk.flash_attn_stats(*leaves, stats=ALL_STATS, backend=backend)
        grads = grads_of(named_outputs(result), leaves, {"out": torch.ones_like(result.out)})
    outside = sk.flash_attn_stats(*leaves, stats=ALL_STATS, backend=backend)
    assert torch.equal(result.out, outside.out) and torch.equal(result.lse, outside.lse)
    for dx, want in zip(
        grads, grads_of(named_outputs(outside), leaves, {"out": torch.ones_like(result.out)}), strict=True
    ):
        assert torch.equal(dx, want)


@by_backend
def test_second_derivative_raises(backend):
    leaves = qkv(Case("T17"), torch.float64)
    mass = sk.flash_attn_stats(*leaves, backend=backend).stats["sink_mass"]
    (dq,) = torch.autograd.grad(mass.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad((dq**2).sum(), leaves[0])


@by_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stats", [(), ("sink_mass",), ALL_STATS], ids=["none", "sink_mass", "all-stats"])
def test_output_dtypes_and_layout(backend, dtype, stats):
    """What the fakes promise: contiguous, rows in fp32 (fp64 for fp64)."""
    case = Case("T5", len_q=5, len_k=9, head_dim=8)
    leaves = qkv(case, dtype)
    result = sk.flash_attn_stats(*leaves, stats=stats, backend=backend)
    rows_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.out.shape == (2, 5, 4, 8) and result.out.dtype == dtype and result.out.is_contiguous()
    for rows in (result.lse, *result.stats.values()):
        assert rows.shape == (2, 4, 5) and rows.dtype == rows_dtype and rows.is_contiguous()
    for leaf, dx in zip(leaves, torch.autograd.grad(result.lse.sum(), leaves, materialize_grads=True), strict=True):
        assert dx.shape == leaf.shape and dx.dtype == dtype and dx.is_contiguous()


@by_backend
def test_forward_and_backward_without_autograd(backend):
    """attn_forward and attn_backward are the operator's two halves."""
    leaves = qkv(Case("T17"), torch.float64)
    inputs = sk.make_inputs(*(x.detach() for x in leaves), stats=ALL_STATS)
    out, lse, stats = sk.attn_forward(inputs, backend)
    result = sk.flash_attn_stats(*leaves, stats=ALL_STATS, backend=backend)
    assert torch.equal(out, result.out) and torch.equal(lse, result.lse)
    dout, dstats = torch.randn_like(out), torch.randn_like(stats)
    got = sk.attn_backward(inputs, out, lse, stats, dout, None, dstats, backend)
    upstream = {"out": dout, **dict(zip(ALL_STATS, dstats, strict=True))}
    for dx, want in zip(got, grads_of(named_outputs(result), leaves, upstream), strict=True):
        torch.testing.assert_close(dx, want, rtol=1e-12, atol=1e-12)
