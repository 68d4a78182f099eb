"""The order in which `auto` tries the backends, and the self-check that a vendor backend must pass first."""

import csv
from dataclasses import replace

import pytest
import surgery_kernels as sk
import torch
import vendor_doubles
from surgery_kernels import backends
from surgery_kernels.backends import choice
from surgery_kernels.backends.choice import Speed
from surgery_kernels.backends.sink_epilogue import reasons, self_check

from bench import choice as bench_choice

Q, KV = torch.zeros(1, 8, 4, 16, dtype=torch.bfloat16), torch.zeros(1, 8, 2, 16, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch):
    monkeypatch.setattr(self_check, "_found", {})


def first(capability, head_dim, length, **options):
    return next(iter(choice.order(capability, head_dim, length, **options)))


TABLE = (
    Speed("9.0", "fa4", 128, 1024, 200.0, "test"),
    Speed("9.0", "fa4", 128, 8192, 500.0, "test"),
    Speed("9.0", "triton", 128, 1024, 300.0, "test"),
    Speed("9.0", "triton", 128, 8192, 400.0, "test"),
    Speed("9.0", "cudnn", 64, 8192, 999.0, "test"),
    Speed("8.0", "flash", 128, 4096, 150.0, "test"),
)


def test_nearest_row_decides():
    assert first((9, 0), 128, 1000, table=TABLE) == "triton"
    assert list(choice.order((9, 0), 128, 9000, table=TABLE))[:3] == ["cudnn", "fa4", "triton"]
    assert first((9, 0), 128, 1 << 20, table=TABLE) == "cudnn"


def test_a_row_claims_nothing_for_much_shorter_problems():
    assert first((9, 0), 128, 600, table=TABLE) == "triton"
    assert first((9, 0), 128, 300, table=TABLE) == choice.DEFAULT[0] == "cpu"


def test_other_minor_versions_borrow_the_rows_of_their_major():
    assert first((8, 6), 64, 4096, table=TABLE) == "flash"
    assert "on 8.0" in choice.order((8, 6), 64, 4096, table=TABLE)["flash"]
    assert "no speed known on 12.0" in choice.order((12, 0), 64, 4096, table=TABLE)["triton"]


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("length", [1, 512, 4096, 1 << 17])
def test_every_backend_has_a_place_and_a_reason(capability, length):
    order = choice.order(capability, 96, length)
    assert set(order) == set(sk.BACKENDS) and list(order)[-1] == "reference"
    assert all(order.values())


def test_committed_table_is_the_estimate_and_says_so():
    """No GPU of ours has measured a row."""
    with open(choice.TABLE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{name: str(x) for name, x in row.items()} for row in bench_choice.estimated()]
    assert {row["source"] for row in rows} == {"estimate, not measured"}


def test_a_kept_backend_wins_somewhere():
    """A vendor backend that is first nowhere, were the faster vendors not installed, would be dead weight."""
    table = choice.current_table()
    assert first((9, 0), 128, 4096) == "fa4"
    without_fa4 = [row for row in table if row.backend != "fa4"]
    assert first((9, 0), 128, 4096, table=without_fa4) == "cudnn"
    assert first((8, 0), 128, 4096) == "flash"


def test_table_of_the_user(tmp_path, monkeypatch):
    path = tmp_path / "speeds.csv"
    path.write_text("capability,backend,head_dim,length,tflops,source\n9.0,triton,128,4096,900,mine\n")
    monkeypatch.setenv("SURGERY_CHOICE_TABLE", str(path))
    assert first((9, 0), 128, 4096) == "triton" and "(mine)" in choice.order((9, 0), 128, 4096)["triton"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"must have the columns \('capability', .*got \('a', 'b'\)"),
        ("capability,backend,head_dim,length,tflops,source\n9.0,fa4,x,1,1,y\n", r"must hold numbers .*'head_dim': 'x'"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "wrong.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        choice.read_table(path)


def test_on_a_cpu_the_cpu_backend_is_first():
    inputs = sk.make_inputs(Q, KV, KV)
    assert next(iter(backends.backend_order(inputs))) == "cpu"
    for name in vendor_doubles.VENDORS:
        with pytest.raises(ValueError, match=f"backend '{name}' cannot run these inputs: runs on NVIDIA GPUs, got cpu"):
            sk.choose_backend(inputs, name)


def on_a_gpu(monkeypatch, capability=(9, 0)):
    """Let the choice believe that the tensors are on a GPU; the self-check then runs on the CPU, on doubles."""
    monkeypatch.setattr(reasons, "_device_reasons", lambda device, index, majors: _major(capability, majors))
    monkeypatch.setattr(reasons, "installed", lambda name: "4.0.0")
    monkeypatch.setattr(backends, "_capability", lambda device, index: capability)
    monkeypatch.setattr(self_check, "_device", lambda index: "cpu")
    for name in ("cpu", "triton"):
        shut = replace(sk.BACKENDS[name], unsupported_reasons=lambda inputs: ["shut"])
        monkeypatch.setitem(sk.BACKENDS, name, shut)


def _major(capability, majors):
    return () if capability[0] in majors else (f"runs on {majors}",)


@pytest.mark.parametrize("vendor", vendor_doubles.VENDORS)
def test_auto_takes_a_vendor_after_its_self_check(vendor, monkeypatch):
    on_a_gpu(monkeypatch, (8, 0) if vendor == "flash" else (9, 0))
    for name in vendor_doubles.VENDORS:
        if name != vendor:
            shut = replace(sk.BACKENDS[name], unsupported_reasons=lambda inputs: ["shut"])
            monkeypatch.setitem(sk.BACKENDS, name, shut)
    vendor_doubles.install(monkeypatch, vendor)
    inputs = sk.make_inputs(Q, KV, KV)
    assert sk.choose_backend(inputs) == vendor
    assert list(self_check._found.values()) == [()]
    monkeypatch.setattr(self_check, "errors", lambda *args: pytest.fail("checked twice"))
    assert sk.choose_backend(inputs, vendor) == vendor


def sabotaged(double, name, change):
    """The double with one result of its backward changed."""
    backward = double.backward

    def wrong(*args, **kwargs):
        grads = list(backward(*args, **kwargs))
        index = ("dq", "dk", "dv").index(name)
        grads[index] = change(grads[index])
        return grads

    return wrong


@pytest.mark.parametrize("gradient", ["dq", "dk", "dv"])
def test_a_wrong_kernel_is_rejected_under_auto_and_raises_when_named(gradient, monkeypatch, caplog):
    on_a_gpu(monkeypatch, (8, 0))
    double = vendor_doubles.install(monkeypatch, "flash")
    monkeypatch.setattr(backends.flash, "_backward_op", sabotaged(double, gradient, lambda x: x * 1.2))
    inputs = sk.make_inputs(Q, KV, KV)
    with caplog.at_level("WARNING", "surgery_kernels"):
        assert sk.choose_backend(inputs) == "reference"
    assert f"is wrong in {gradient}" in caplog.text
    with pytest.raises(ValueError, match=f"its self-check is wrong in {gradient}"):
        sk.choose_backend(inputs, "flash")


def test_a_kernel_that_uses_out_for_more_than_delta_is_rejected(monkeypatch):
    """What the adjusted `out` rests on; a release of torch that broke it must not be taken."""
    on_a_gpu(monkeypatch, (8, 0))
    double = vendor_doubles.install(monkeypatch, "flash")

    def wrong(dout, q, k, v, out, *rest, **options):
        dq, dk, dv = double.backward(dout, q, k, v, out, *rest, **options)
        return dq, dk, dv + 0.1 * out.abs().mean()

    monkeypatch.setattr(backends.flash, "_backward_op", wrong)
    with pytest.raises(ValueError, match="its self-check is wrong in dv"):
        sk.choose_backend(sk.make_inputs(Q, KV, KV), "flash")


def test_a_kernel_that_raises_is_a_reason(monkeypatch):
    on_a_gpu(monkeypatch)
    vendor_doubles.install(monkeypatch, "cudnn")

    def broken(*args, **options):
        raise RuntimeError("no plan")

    monkeypatch.setattr(backends.cudnn, "_forward_op", broken)
    with pytest.raises(ValueError, match="its self-check raises RuntimeError: no plan"):
        sk.choose_backend(sk.make_inputs(Q, KV, KV), "cudnn")


def test_self_check_can_be_left_out(monkeypatch):
    on_a_gpu(monkeypatch)
    monkeypatch.setenv("SURGERY_SELF_CHECK", "0")
    monkeypatch.setattr(self_check, "errors", lambda *args: pytest.fail("checked"))
    assert sk.choose_backend(sk.make_inputs(Q, KV, KV), "cudnn") == "cudnn"


KINDS = [
    self_check.Kind(torch.bfloat16, 32, True, True, (False, False), False, "dense"),
    self_check.Kind(torch.bfloat16, 64, False, False, (False, False), False, "padded"),
    self_check.Kind(torch.bfloat16, 32, True, True, (True, False), False, "padded"),
    self_check.Kind(torch.bfloat16, 32, False, True, (False, False), False, "packed"),
    self_check.Kind(torch.float16, 32, True, False, (True, True), True, "packed"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.layout}-{'causal' if kind.causal else 'full'}")
@pytest.mark.parametrize("vendor", vendor_doubles.VENDORS)
def test_self_check_passes_what_is_right(vendor, kind, monkeypatch):
    """And leaves room: a tolerance that a right kernel just meets would reject it on the next device."""
    if vendor == "cudnn" and kind.layout != "dense":
        pytest.skip("dense only")
    if kind.dtype == torch.float16 and vendor != "fa4":
        pytest.skip("bf16 only")
    vendor_doubles.install(monkeypatch, vendor)
    errors = self_check.errors(sk.BACKENDS[vendor], kind, "cpu")
    assert set(errors) == {"out", "lse", "sink_mass", "dq", "dk", "dv"}
    assert all(0.0 < error < 0.7 for error in errors.values()), errors


def test_self_check_sees_a_wrong_window(monkeypatch):
    vendor_doubles.install(monkeypatch, "flash")
    forward = backends.flash._forward_op

    def narrow(*args, window_size_left, **options):
        return forward(*args, window_size_left=window_size_left - 1, **options)

    monkeypatch.setattr(backends.flash, "_forward_op", narrow)
    errors = self_check.errors(sk.BACKENDS["flash"], KINDS[2], "cpu")
    assert max(errors["lse"], errors["out"]) > 1.0


def test_written_out_truth_is_the_reference():
    """The self-check's own fp64 formulas against the reference backend."""
    for kind in KINDS:
        inputs = self_check.small_problem(kind._replace(dtype=torch.float64, head_dim=8), "cpu")
        out, lse, stats = sk.attn_forward(inputs, "reference")
        dout, rows = torch.randn_like(out), torch.randn(2, *lse.shape, dtype=torch.float64)
        truth = self_check.written_out(inputs, dout, *rows)
        grads = sk.attn_backward(inputs, out, lse, stats, dout, rows[0], rows[1][None], "reference")
        for got, want in zip(truth.values(), (out, lse, stats[0], *grads), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_choice_can_be_traced(dynamic, monkeypatch):
    """fullgraph: the device, the order and the self-check are constants, asked once while tracing."""
    on_a_gpu(monkeypatch, (8, 0))
    vendor_doubles.install(monkeypatch, "flash")
    for name in ("_device_reasons", "installed"):
        getattr(reasons, name)._dynamo_marked_constant = True
    backends._capability._dynamo_marked_constant = True
    names = []

    def attend(q, k):
        name = sk.choose_backend(sk.make_inputs(q, k, k))
        names.append(name)
        return q + len(name)

    out = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="eager")(Q, KV)
    assert (out == len("flash")).all() and names == ["flash"]
    assert list(self_check._found.values()) == [()]


@pytest.mark.parametrize(
    ("changed", "vendor", "message"),
    [
        ({"softcap": 3.0}, "flash", "knows no softcap, got 3.0"),
        ({"window_size": (3, 0)}, "cudnn", r"knows no window, got \(3, 0\)"),
        ({"stats": ("sink_mass", "entropy")}, "fa4", "has sink_mass only, got entropy"),
        ({"sinks": torch.zeros(1, 1, dtype=torch.int32)}, "fa4", "others cannot be hidden .*, got positions"),
        ({"softmax_scale": -1.0}, "flash", "softmax_scale must be positive, got -1.0"),
        ({"leftpad_k": torch.zeros(1, dtype=torch.int32)}, "cudnn", "takes no packed sequences and no padding"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x), ""),
)
def test_reasons_say_what_was_got(changed, vendor, message):
    with pytest.raises(ValueError, match=message):
        sk.choose_backend(sk.make_inputs(Q, KV, KV, **changed), vendor)


def test_reasons_of_dtype_shape_and_device():
    found = sk.backend_reasons(sk.make_inputs(Q.half(), KV.half(), KV.half()))
    assert "takes torch.bfloat16, got torch.float16" in found["flash"]
    assert "flash-attn-4 is not installed" in found["fa4"]
    q, k = torch.zeros(1, 8, 2, 20), torch.zeros(1, 9, 2, 20)
    assert "head_dim must be a multiple of 8 up to 256, got 20" in sk.backend_reasons(sk.make_inputs(q, k, k))["fa4"]
    assert (
        "aligns causal at the top left, got 8 rows and 9 keys" in sk.backend_reasons(sk.make_inputs(q, k, k))["cudnn"]
    )
    many = sk.make_inputs(torch.zeros(1, 40, 1, 16), *(torch.zeros(1, 40, 1, 16),) * 2, sinks=17)
    assert "takes at most 16 sinks a sequence, got 17" in sk.backend_reasons(many)["fa4"]


def test_measuring_needs_a_gpu_and_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        bench_choice.main([])
    assert "measuring needs a CUDA device" in capsys.readouterr().err


def test_measured_step_runs_forward_and_backward():
    inputs = bench_choice.problem(8, 16, "cpu", torch.float32, tokens=16, heads=(4, 2))
    assert inputs.q.shape == (2, 8, 4, 16)
    dq, dk, dv = bench_choice.step_of(inputs, "cpu")()
    assert dq.abs().max() > 0 and dk.shape == dv.shape == inputs.k.shape


def test_speed_counts_the_useful_products():
    """3.5 times the forward's 2 * 2 N^2 D / 2 of a causal head: 16384 tokens, 32 heads, as flash-attention counts."""
    one_head = 2 * 2 * 4096**2 * 128 / 2
    assert bench_choice.flops(128, 4096) == 3.5 * one_head * 32 * (16384 // 4096)
