"""Peak memory against length: the fits on known curves, and the curves of what runs on a CPU."""

import math
from types import SimpleNamespace

import pytest
import torch

from bench import memory
from bench.implementations import IMPLEMENTATIONS
from bench.memory_fit import curves, fit, fit_lines, growth, longest
from bench.records import read_csv
from bench.shapes import Case

LENGTHS = [256, 512, 1024, 2048, 4096]


def test_fits_find_the_coefficients():
    line, residual = fit(LENGTHS, [1000 + 24 * n for n in LENGTHS], 1)
    assert line == pytest.approx([1000, 24], rel=1e-9) and residual < 1e-12
    parabola, residual = fit(LENGTHS, [500 + 24 * n + 6 * n * n for n in LENGTHS], 2)
    assert parabola == pytest.approx([500, 24, 6], rel=1e-6) and residual < 1e-9
    # a parabola is no line, and the residual says so
    assert fit(LENGTHS, [6 * n * n for n in LENGTHS], 1)[1] > 0.3
    with pytest.raises(ValueError, match="needs at least 3 lengths, got 2"):
        fit([1, 2], [1, 2], 2)


def test_growth_tells_lines_from_parabolas():
    assert abs(growth(LENGTHS, [1000 + 24 * n for n in LENGTHS])) < 1e-6
    assert growth(LENGTHS, [24 * n + 6 * n * n for n in LENGTHS]) > 0.99


def test_longest_length_of_a_budget():
    assert longest([100, 10], 1100) == 100
    n = longest([100, 10, 2], 10_000)
    assert 100 + 10 * n + 2 * n * n <= 10_000 < 100 + 10 * (n + 1) + 2 * (n + 1) ** 2
    assert longest([100, 10], 50) == 0
    assert longest([100, 10, 2], 50) == 0
    assert longest([100, 0], 200) == math.inf


@pytest.fixture(scope="module")
def rows():
    found = []
    for length in (128, 256, 512, 1024):
        entries = [IMPLEMENTATIONS[name] for name in ("ours_cpu", "ours_cpu_off", "paper", "fa4")]
        found += memory.measure_case(Case("tiny", length, dtype="float32"), entries, "cpu")
    return found


def test_ours_is_linear_and_the_papers_way_quadratic(rows):
    found = {key[0]: curve for key, curve in curves(rows).items()}
    assert set(found) == {"ours_cpu", "ours_cpu_off", "paper"}
    for name, quadratic in (("ours_cpu", False), ("ours_cpu_off", False), ("paper", True)):
        lengths, peaks, failed = found[name]
        assert lengths == [128, 256, 512, 1024] and failed == []
        assert (growth(lengths, peaks) > 0.5) == quadratic
        assert fit(lengths, peaks, 2 if quadratic else 1)[1] < 0.02
    # four heads of maps, in fp32, more than once
    assert found["paper"][1][-1] > 2 * 4 * 4 * 1024**2
    # the inputs count: q and dout, k and v, dsink_mass; ours needs a few times as much in all
    inputs = 4 * 1024 * ((2 * 4 + 2 * 2) * 16 + 4)
    assert inputs < found["ours_cpu"][1][-1] < 4 * inputs


def test_lines_of_text(rows):
    lines = fit_lines(rows, budget=2**30)
    assert [line.split()[0] for line in lines] == ["linear", "linear", "quadratic"]
    assert "128 to 1024 tokens" in lines[0] and "tokens in 1 GiB" in lines[0]
    assert " N^2 bytes" in lines[2]
    assert fit_lines(rows[:3])[0].startswith("not fitted")
    gone = {**rows[2], "length": 2048, "unit": "oom", "p50": ""}
    assert "out of memory at 2048" in fit_lines([*rows, gone])[2]


def test_out_of_memory_and_errors_are_rows(monkeypatch):
    def fail(message):
        def peak(*args):
            raise RuntimeError(message)

        return peak

    said = []
    for message, unit in (("can't allocate memory", "oom"), ("shapes do not match", "error")):
        monkeypatch.setattr(memory, "peak_bytes", fail(message))
        (row,) = memory.measure_case(Case("tiny", 32), [IMPLEMENTATIONS["paper"]], "cpu", said.append)
        assert (row["unit"], row["p50"]) == (unit, "")
    assert len(said) == 1 and "shapes do not match" in said[0]


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "limit_memory", lambda: None)
    path = str(tmp_path / "memory.csv")
    arguments = ["--device", "cpu", "--shapes", "tiny", "--lengths", "32,64,128,256", "--impls", "ours_cpu,eager"]
    assert memory.main([*arguments, "--csv", path]) == 0
    first = capsys.readouterr().out
    assert len(read_csv(path)) == 8
    assert memory.main(["--from", path, "--budget", "1"]) == 0
    again = capsys.readouterr().out
    assert again.count("tokens in 1 GiB") == 2
    assert "linear" in first and "quadratic" in first
    with pytest.raises(SystemExit):
        memory.main([*arguments, "--batch", "0"])


def test_gpu_peaks_come_from_the_allocator(monkeypatch):
    """Peak over what was there before, of the second step, and the inputs."""
    state = SimpleNamespace(now=1000, peak=0, steps=0)

    def step(runner):
        # the first one compiles and keeps a workspace
        state.steps += 1
        state.now += 500 if state.steps == 1 else 0
        state.peak = max(state.peak, state.now + 70)

    monkeypatch.setattr(memory, "_step", step)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state.now)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(state, "peak", state.now))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state.peak)
    problem = SimpleNamespace(nbytes=lambda: 30)
    assert memory.peak_bytes(None, problem, "cuda") == 30 + 70
    assert state.steps == 2
