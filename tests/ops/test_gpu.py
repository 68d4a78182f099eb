"""What only a GPU can show of the Triton kernels: 16-bit numerics at size, repeatability, graphs, streams, offsets."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import surgery_kernels as sk
import torch
from triton_cases import DEVICE, Case, check, run

if DEVICE != "cuda":
    pytest.skip("needs a CUDA device", allow_module_level=True)

BF16 = Case(517, 517, batch=2, n_heads=4, n_kv=2, head_dim=128, dtype=torch.bfloat16, stats=("sink_mass",))
PADDED = {"leftpad_k": (0, 37), "seqused_q": (517, 450), "seqused_k": (517, 450)}


def close(actual, expected):
    """Sums of bf16 products in another order."""
    scale = expected.float().abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=2e-2 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_head_dims(head_dim, dtype):
    check(replace(BF16, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "options",
    [
        PADDED,
        PADDED | {"sinks": ((3, 300), (200, 201))},
        {"causal": False},
        {"window_size": (100, -1)},
        {"window_size": (64, 32), "causal": False},
        {"softcap": 20.0},
        {"len_k": 900},
        {"len_q": 900},
        {"stats": tuple(sk.STATS), "sinks": 4},
        {"batch": 1, "lengths": ((300, 300), (0, 0), (1, 1), (129, 200))},
    ],
    ids=lambda options: "-".join(options),
)
def test_features(options, dtype):
    check(replace(BF16, dtype=dtype, **options))


@pytest.mark.parametrize("which", range(3), ids=["out", "lse", "sink_mass"])
def test_gradient_of_one_output(which):
    check(replace(BF16, **PADDED), which=[which])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_repeats_bitwise(head_dim):
    case = replace(BF16, head_dim=head_dim, len_q=2048, len_k=2048, n_heads=8)
    qkv = case.qkv()
    outputs, grads = run(case, qkv)
    for _ in range(5):
        again_outputs, again_grads = run(case, qkv)
        for a, b in zip((*outputs, *grads), (*again_outputs, *again_grads), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_single_pass(head_dim, monkeypatch):
    monkeypatch.setenv("SURGERY_BACKWARD", "single_pass")
    check(replace(BF16, head_dim=head_dim, **PADDED))


def step(q, k, v, dout):
    """Gradients of the sum of everything, into q.grad, k.grad, v.grad."""
    got = sk.flash_attn_stats(q, k, v, backend="triton")
    torch.autograd.backward((got.out, got.lse.sum() + got.stats["sink_mass"].sum()), (dout, None))


def test_cuda_graph():
    """Captured once, replayed on other numbers."""
    leaves = [x.requires_grad_() for x in BF16.qkv()]
    dout = torch.randn_like(leaves[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # compiles and checks itself outside the capture
        for _ in range(3):
            step(*leaves, dout)
    torch.cuda.current_stream().wait_stream(side)
    for x in leaves:
        x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*leaves, dout)
    with torch.no_grad():
        for x, new in zip(leaves, replace(BF16, seed=7).qkv(), strict=True):
            x.copy_(new)
    graph.replay()
    replayed = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    step(*leaves, dout)
    assert all(torch.equal(a, x.grad) for a, x in zip(replayed, leaves, strict=True))


def test_streams():
    """Two problems on two streams at once give what they give alone."""
    problems = [replace(BF16, seed=seed, len_q=2048, len_k=2048).qkv() for seed in (1, 2)]
    alone = [sk.flash_attn_stats(*qkv, backend="triton") for qkv in problems]
    torch.cuda.synchronize()
    streams, together = [torch.cuda.Stream() for _ in problems], []
    for stream, qkv in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            together.append(sk.flash_attn_stats(*qkv, backend="triton"))
    torch.cuda.synchronize()
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.out, b.out) and torch.equal(a.stats["sink_mass"], b.stats["sink_mass"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_devices():
    """The launch goes to the tensors' device, whichever is current."""
    qkv = BF16.qkv()
    expected = sk.flash_attn_stats(*qkv, backend="triton")
    there = sk.flash_attn_stats(*(x.to("cuda:1") for x in qkv), backend="triton")
    assert there.out.device.index == 1 and torch.equal(there.out.cpu(), expected.out.cpu())


def test_no_host_synchronisation():
    """Padding bounds and sink positions are read on the device."""
    case = replace(BF16, sinks=((3, 300), (200, 201)), **PADDED)
    leaves = [x.requires_grad_() for x in case.qkv()]
    bounds = {name: torch.tensor(x, dtype=torch.int32, device=DEVICE) for name, x in PADDED.items()}
    sinks = torch.tensor(case.sinks, dtype=torch.int32, device=DEVICE)

    def both():
        got = sk.flash_attn_stats(*leaves, sinks=sinks, backend="triton", **bounds)
        (got.out.float().sum() + got.stats["sink_mass"].sum()).backward()

    both()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_transposed_inputs_are_not_copied():
    """[B, H, T, D] memory, as Hugging Face's models have it: peak memory is out, lse and the statistic."""
    shape = (2, 16, 4096, 128)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    sk.flash_attn_stats(q, k, v, backend="triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = sk.flash_attn_stats(q, k, v, backend="triton")
    needed = sum(x.numel() * x.element_size() for x in (got.out, got.lse, got.stats["sink_mass"]))
    assert torch.cuda.max_memory_allocated() - before <= needed + 2**21


def test_more_than_2_31_elements():
    """The last rows of a tensor that 32-bit offsets do not reach."""
    length, n_heads, head_dim, window = 2**19 + 300, 32, 128, 128
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free memory")
    q = torch.randn(1, length, n_heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    assert q.numel() > 2**31
    k = torch.randn(1, length, 1, head_dim, device=DEVICE, dtype=torch.bfloat16)
    got = sk.flash_attn_stats(q, k, k, window_size=(window, 0), sinks=length, stats=("sink_mass",), backend="triton")
    rows = slice(length - 500, length)
    few = sk.flash_attn_stats(
        q[:, rows], k[:, rows], k[:, rows], window_size=(window, 0), sinks=500, stats=("sink_mass",), backend="triton"
    )
    close(got.out[:, rows][:, window:], few.out[:, window:])
    close(got.stats["sink_mass"][..., rows][..., window:], few.stats["sink_mass"][..., window:])


def test_inductor():
    """The default compiler, whole graph, forward and backward."""
    leaves = [x.requires_grad_() for x in BF16.qkv()]

    def loss(q, k, v):
        got = sk.flash_attn_stats(q * 1.5, k, v, backend="triton")
        return got.out.float().square().mean() + got.stats["sink_mass"].mean()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(compiled, eager, strict=True):
        close(a, b)


def test_autocast():
    """fp32 leaves under autocast, as in mixed-precision training: the projections hand the kernel bf16."""
    weight = torch.randn(3, 64, 64, device=DEVICE, requires_grad=True)
    x = torch.randn(2, 300, 2, 64, device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        q, k, v = (x @ w for w in weight)
        got = sk.flash_attn_stats(q, k, v, backend="triton")
    assert got.out.dtype == torch.bfloat16 and got.lse.dtype == torch.float32
    (got.out.float().sum() + got.stats["sink_mass"].sum()).backward()
    assert weight.grad.isfinite().all()


def test_self_check_accepts_the_tables(caplog):
    """Every kernel of the default tables computes correctly on this device, so none is replaced."""
    from surgery_kernels.backends.triton import configs, run, self_check

    capability = torch.cuda.get_device_capability()
    for head_dim in (64, 80, 96, 128, 256):
        like = torch.empty(1, 1, 1, head_dim, device=DEVICE, dtype=torch.bfloat16)
        inputs = sk.make_inputs(like, like, like)
        for kernel in configs.KERNELS:
            if kernel == "bwd" and head_dim > configs.MAX_SINGLE_PASS:
                continue
            config = run.choices(kernel, capability, inputs)[0]
            errors = self_check.errors(kernel, like, config)
            assert all(error <= 1.0 for error in errors.values()), (kernel, head_dim, config, errors)


def test_sanitizer_script_runs():
    """What gpu.sh puts under compute-sanitizer."""
    script = Path(__file__).with_name("gpu_sanitizer.py")
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True)
