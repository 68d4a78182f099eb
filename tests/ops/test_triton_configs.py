"""Configuration tables, their choice, and the self-check that guards it."""

import logging
import math
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import pytest
import surgery_kernels as sk
import torch
from triton_cases import DEVICE, Case, interpreter  # noqa: F401

pytest.importorskip("triton")
from surgery_kernels.backends.triton import configs, launch, ptxas, run, self_check, tune
from surgery_kernels.backends.triton.configs import TileConfig

CHUNKS = {1: (16, 0), 16: (16, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 112: (128, 0)}
CHUNKS |= {128: (128, 0), 160: (128, 32), 192: (128, 64), 256: (256, 0)}


@pytest.mark.parametrize("head_dim, expected", CHUNKS.items())
def test_chunks(head_dim, expected):
    assert configs.chunks(head_dim) == expected


def test_chunks_rejects_large_heads():
    with pytest.raises(ValueError, match="257"):
        configs.chunks(257)


@pytest.mark.parametrize(
    "capability, arch",
    [((8, 0), 80), ((8, 6), 86), ((8, 9), 86), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 86)],
)
def test_arch_of(capability, arch):
    assert configs.arch_of(capability) == arch


@pytest.mark.parametrize("arch", configs.TABLES)
@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_head_dim_has_a_choice_and_a_fallback(arch, kernel, itemsize):
    largest = configs.MAX_SINGLE_PASS if kernel == "bwd" else configs.MAX_HEAD_DIM
    for head_dim in range(1, largest + 1):
        choices = configs.choose(kernel, (arch // 10, arch % 10), head_dim, itemsize)
        assert len(choices) == len(set(choices)) >= 2
        for config in choices:
            sizes = (config.block_m, config.block_n, config.num_warps)
            assert all(n & (n - 1) == 0 for n in sizes) and min(sizes[:2]) >= 16


def test_tuned_tiles_come_first(tmp_path):
    """What tune.py writes is read back, for its own compute capability, kernel, head dim and element size only."""
    path, best = tmp_path / "tiles.json", TileConfig(64, 32, 8, 4)
    tune.write(path, (9, 0), "dq", 128, 2, TileConfig(32, 32, 4, 1))
    tune.write(path, (9, 0), "fwd", 128, 2, best)
    tuned = configs.read_tiles(str(path))
    built_in = configs.choose("fwd", (9, 0), 128, 2)
    assert configs.choose("fwd", (9, 0), 128, 2, tuned) == (best, *built_in)
    for other in (("fwd", (8, 0), 128, 2), ("fwd", (9, 0), 64, 2), ("dkdv", (9, 0), 128, 2), ("fwd", (9, 0), 128, 4)):
        assert configs.choose(*other, tuned) == configs.choose(*other)


def test_a_tuned_row_keeps_what_ptxas_was_told(tmp_path):
    path, best = tmp_path / "tiles.json", TileConfig(64, 32, 8, 4, 168, 10)
    tune.write(path, (9, 0), "dq", 128, 2, best)
    assert configs.choose("dq", (9, 0), 128, 2, configs.read_tiles(str(path)))[0] == best


def inputs_of(head_dim=128, dtype=torch.bfloat16, length=32, **options):
    q = torch.empty(2, length, 4, head_dim, dtype=dtype)
    return sk.make_inputs(q, q[:, :, :2], q[:, :, :2], **options)


def test_ptxas_table_is_in_range():
    for (release, arch, kernel, head_dim), (level, *caps) in ptxas.read_table().items():
        assert release in ("3.6", "3.8") and arch in configs.TABLES and kernel in configs.KERNELS
        assert head_dim <= configs.MAX_HEAD_DIM and level in range(11)
        assert all(cap == 0 or 32 < cap <= 255 for cap in caps)
        assert (level, *caps) != (5, 0, 0)


@pytest.fixture
def told(monkeypatch):
    """A ptxas table of one row."""
    monkeypatch.setattr(ptxas, "read_table", lambda: {("3.8", 90, "dq", 128): (10, 168, 160)})


@pytest.mark.parametrize("stats, cap", [((), 168), (("sink_mass",), 160)])
def test_options_of_ptxas(told, stats, cap):
    """They are those of the release, architecture, kernel, head dim and statistic, and come before the row without."""
    inputs = inputs_of(stats=stats)
    options = ptxas.options_of("dq", (9, 0), inputs, "3.8.1")
    assert options == {"register_usage": 10, "max_registers": cap}
    stock = configs.choose("dq", (9, 0), 128, 2)
    best = replace(stock[0], **options)
    assert configs.choose("dq", (9, 0), 128, 2, ptxas=options) == (best, *stock)
    tuned = {configs.tile_key((9, 0), "dq", 128, 2): stock[-1]}
    assert configs.choose("dq", (9, 0), 128, 2, tuned, options)[:2] == (stock[-1], best)
    for other in (("fwd", (9, 0), "3.8.0"), ("dq", (8, 0), "3.8.0"), ("dq", (9, 0), "3.7.0"), ("dq", None, "3.8.0")):
        assert ptxas.options_of(other[0], other[1], inputs, other[2]) == {}
    for strange in (inputs_of(64, stats=stats), inputs_of(dtype=torch.float32, stats=stats)):
        assert ptxas.options_of("dq", (9, 0), strange, "3.8.0") == {}


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"causal": False},
        {"length": 33},
        {"window_size": (8, 0)},
        {"stats": ("entropy",)},
        {"stats": ("sink_mass", "max_logit")},
        {"sinks": torch.zeros(2, 1, dtype=torch.int32)},
        {"leftpad_k": torch.ones(2, dtype=torch.int32)},
        {"seqused_k": torch.ones(2, dtype=torch.int32)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_caps_are_for_what_was_compiled_under_them(told, options):
    """Elsewhere a cap may spill; the level stays."""
    assert ptxas.options_of("dq", (9, 0), inputs_of(**options), "3.8.0") == {"register_usage": 10, "max_registers": 0}


def test_options_reach_the_compiler(monkeypatch):
    inputs, dout, rows = tune.problem(16, torch.float32, DEVICE, length=20, tokens=20, n_heads=1, n_kv=1)
    expected = {"maxnreg": 128, "ptx_options": "--register-usage-level=10"}
    for told, options in (((), {}), ((128, 10), expected)):
        made = run.launch_of("dq", inputs, TileConfig(16, 16, 4, 1, *told), dout, rows)
        assert made.options == {"num_warps": 4, "num_stages": 1} | options
    monkeypatch.setenv("PTXAS_OPTIONS", "--warn-on-spills")
    assert made.options["ptx_options"] == "--warn-on-spills --register-usage-level=10"


def test_backend_asks_for_the_options(monkeypatch):
    asked = []
    monkeypatch.setattr(run, "options_of", lambda *args: asked.append(args) or {"register_usage": 0})
    inputs = inputs_of()
    assert run.choices("fwd", (9, 0), inputs)[0].register_usage == 0
    assert asked == [("fwd", (9, 0), inputs, metadata.version("triton"))]


@pytest.mark.parametrize("text", [None, "{", "[]", '{"sm_90 fwd": "64 32"}', '{"sm_90 fwd": "a b c d"}'])
def test_a_bad_tile_file_is_an_error(tmp_path, text):
    path = tmp_path / "tiles.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="SURGERY_TILES"):
        configs.read_tiles(str(path))


def test_backend_reads_the_tile_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_TILES", str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="SURGERY_TILES"):
        sk.flash_attn_stats(*Case(9, 9).qkv(), backend="triton")


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_tuning_takes_the_fastest_correct_configuration(kernel, monkeypatch):
    """Wrong and broken ones are reported and never chosen, however fast."""
    wrong, broken, slow, fast = (TileConfig(n, 16, 4, stages) for n, stages in ((64, 1), (64, 2), (16, 1), (32, 1)))
    errors, times = self_check.errors, {}

    def checked(kernel, like, config):
        if config == broken:
            raise RuntimeError("out of resources")
        return {"out": 7.0} if config == wrong else errors(kernel, like, config)

    def milliseconds(launch):
        launch.run()
        times[launch.config] = {slow: 2.0, fast: 1.0}.get(launch.config, 0.0)
        return times[launch.config]

    monkeypatch.setattr(self_check, "errors", checked)
    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    lines = []
    made = tune.problem(16, torch.float32, DEVICE, length=40, tokens=40, n_heads=2, n_kv=1)
    assert tune.tune(kernel, *made, [wrong, broken, slow, fast], lines.append) == fast
    assert list(times) == [slow, fast]
    assert "times the tolerance" in lines[0] and "out of resources" in lines[1] and "2.000 ms" in lines[2]
    with pytest.raises(RuntimeError, match=kernel):
        tune.tune(kernel, *made, [wrong], lines.append)


def test_tuning_times_launches():
    inputs, dout, rows = tune.problem(16, torch.float32, DEVICE, length=20, tokens=20, n_heads=1, n_kv=1)
    assert tune.milliseconds(run.launch_of("dq", inputs, TileConfig(16, 16, 4, 1), dout, rows)) > 0


def test_interpreter_needs_no_device():
    assert configs.choose("fwd", None, 64, 2) == (configs.INTERPRETER,)


def test_prepare_moves_the_sign_into_q():
    q = torch.randn(1, 4, 1, 16)
    for scale, sign, kept in ((0.5, 1, 0.5), (-0.5, -1, 0.5), (0.0, 0, 1.0)):
        inputs = sk.make_inputs(q, q, q, softmax_scale=scale)
        prepared, got = launch.prepare(inputs)
        assert (got, prepared.softmax_scale) == (sign, kept)
        torch.testing.assert_close(prepared.q * kept, q * scale)


def test_narrow_copies_what_32_bits_cannot_reach():
    x = torch.empty(1, 2, 1, 16, device="meta")
    far = x.as_strided((1, 2, 1, 16), (2**26, 2**25, 16, 1))
    assert launch.narrow(x) is x and launch.narrow(far).stride(1) == 16


@pytest.fixture
def self_checking(monkeypatch):
    """The self-check as on a device, with its memory emptied."""
    monkeypatch.setattr(self_check, "_wanted", lambda like: True)
    monkeypatch.setattr(self_check, "_verified", {})


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_self_check_accepts_the_kernels(kernel):
    like = torch.empty(1, 1, 1, 16, device=DEVICE)
    errors = self_check.errors(kernel, like, TileConfig(32, 16, 4, 1))
    assert errors and all(error <= 1.0 for error in errors.values())


def test_self_check_falls_back_once_and_says_so(self_checking, monkeypatch, caplog):
    """A configuration that computes wrongly, or does not compile, is skipped with one line; then remembered."""
    wrong, broken, right = (TileConfig(n, 16, 4, 1) for n in (16, 64, 32))
    honest = self_check.errors

    def errors(kernel, like, config):
        if config == broken:
            raise RuntimeError("out of resources")
        return {"out": math.nan} if config == wrong else honest(kernel, like, config)

    monkeypatch.setattr(self_check, "errors", errors)
    like = torch.empty(1, 1, 1, 16, device=DEVICE)
    with caplog.at_level(logging.WARNING, "surgery_kernels"):
        for _ in range(2):
            assert self_check.checked("fwd", like, (wrong, broken, right)) == right
    assert len(caplog.records) == 2
    assert "block_m=16" in caplog.text and "out of resources" in caplog.text


def test_self_check_raises_when_nothing_works(self_checking, monkeypatch):
    monkeypatch.setattr(self_check, "errors", lambda *args: {"dq": 7.0})
    like = torch.empty(1, 1, 1, 16, device=DEVICE)
    with pytest.raises(RuntimeError, match="no configuration of the triton dq kernel"):
        self_check.checked("dq", like, (TileConfig(16, 16, 4, 1),))


def test_backend_asks_the_self_check(self_checking, monkeypatch, caplog):
    """Inside the registered operator, where autograd is off, and only once a kernel."""
    asked, honest = [], self_check.errors
    monkeypatch.setattr(self_check, "errors", lambda kernel, *args: asked.append(kernel) or honest(kernel, *args))
    for _ in range(2):
        q, k, v = (x.requires_grad_() for x in Case(9, 9).qkv())
        sk.flash_attn_stats(q, k, v, backend="triton").out.sum().backward()
    assert sorted(asked) == ["dkdv", "dq", "fwd"]
    assert not caplog.records


def test_heads_are_not_split_off_the_device():
    q, k, v = Case(9, 9, n_heads=4, n_kv=2).qkv()
    if DEVICE == "cpu":
        assert run.head_splits(sk.make_inputs(q, k, v), TileConfig(32, 16, 4, 1)) == 1


def test_import_leaves_triton_alone():
    code = "import sys, surgery_kernels; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
