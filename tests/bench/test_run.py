"""bench.run and bench.verify: red, failed and unsupported rows, the CSV, and the order of tests and times."""

import pytest
import torch

from bench import run, verify
from bench.implementations import IMPLEMENTATIONS, Implementation
from bench.implementations.types import limits
from bench.records import environment, read_csv, write_csv
from bench.run import COLUMNS, measure_case, table
from bench.shapes import Case

CASE = Case("tiny", 40, batch=2, dtype="float32")
ARGUMENTS = ["--device", "cpu", "--shapes", "tiny", "--lengths", "32", "--dtype", "float32", "--repetitions", "2"]


@pytest.fixture(autouse=True)
def no_memory_limit(monkeypatch):
    """It would hold for the rest of the test process."""
    monkeypatch.setattr(run, "limit_memory", lambda: None)


def with_build(name, build, **options):
    return Implementation(name, "", limits(), build, "bhtd_view", **options)


def half_the_mass(case, device):
    right = IMPLEMENTATIONS["eager"].build(case, device)
    return lambda q, k, v: {**(found := right(q, k, v)), "sink_mass": 0.5 * found["sink_mass"]}


def detached_mass(case, device):
    right = IMPLEMENTATIONS["eager"].build(case, device)
    return lambda q, k, v: {**(found := right(q, k, v)), "sink_mass": found["sink_mass"].detach() + 0 * q.sum()}


def broken(case, device):
    raise TypeError("unexpected keyword")


def too_large(case, device):
    def call(q, k, v):
        raise RuntimeError("CUDA out of memory. Tried to allocate 99 GiB")

    return call


@pytest.fixture(scope="module")
def measured():
    entries = [
        IMPLEMENTATIONS["ours_cpu"],
        IMPLEMENTATIONS["fa4"],
        with_build("half", half_the_mass),
        with_build("detached", detached_mass),
        with_build("broken", broken),
        with_build("large", too_large),
        with_build("forward_only", IMPLEMENTATIONS["eager"].build, backward=False),
    ]
    said = []
    rows = measure_case(CASE, entries, "cpu", 1e9, repetitions=3, log=said.append)
    return rows, said


def of(rows, impl, metric=None):
    return [row for row in rows if row["impl"] == impl and metric in (None, row["metric"])]


def test_a_right_implementation_has_times(measured):
    rows, _ = measured
    (correctness,) = of(rows, "ours_cpu", "correctness")
    assert correctness["unit"] == "pass" and 0 < correctness["p50"] <= 1
    times = {row["mode"]: row for row in of(rows, "ours_cpu", "time")}
    assert set(times) == {"forward", "backward", "both"}
    for mode, row in times.items():
        assert row["unit"] == "s" and row["repetitions"] == 3
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        (rate,) = [other for other in of(rows, "ours_cpu", "throughput") if other["mode"] == mode]
        assert rate["p50"] == pytest.approx(CASE.flops(mode) / row["p50"] / 1e12)
        (share,) = [other for other in of(rows, "ours_cpu", "of_ceiling") if other["mode"] == mode]
        assert share["p50"] == pytest.approx(rate["p50"] * 1e12 / 1e9 * 100)


@pytest.mark.parametrize(("name", "worst"), [("half", "sink_mass"), ("detached", "dq")])
def test_a_wrong_implementation_is_red_and_never_a_time(measured, name, worst):
    rows, _ = measured
    (row,) = of(rows, name)
    assert (row["metric"], row["unit"]) == ("correctness", "red")
    assert row["p50"] > 2
    assert worst in row["note"] or "dk" in row["note"]
    assert f"{name:20}" in table(CASE, rows) and "RED" in table(CASE, rows)


def test_what_cannot_run_is_a_row_with_its_reason(measured):
    rows, said = measured
    (unsupported,), (error,), (oom,) = (of(rows, name) for name in ("fa4", "broken", "large"))
    assert unsupported["unit"] == "unsupported" and "runs on cuda, got cpu" in unsupported["note"]
    assert (error["unit"], error["note"]) == ("error", "TypeError")
    assert oom["unit"] == "oom"
    assert all(row["p50"] == "" for row in (unsupported, error, oom))
    # the message is printed and not in the CSV: it may hold paths
    assert said == [f"broken on {CASE}: TypeError: unexpected keyword"]


def test_a_forward_only_implementation(measured):
    rows, _ = measured
    assert [row["mode"] for row in of(rows, "forward_only", "time")] == ["forward"]


def test_csv_comes_back(measured, tmp_path):
    rows, path = measured[0], tmp_path / "deep" / "run.csv"
    known = {**environment("cpu"), "run": "1"}
    write_csv(path, [{**row, **known} for row in rows], COLUMNS)
    write_csv(path, [{**rows[0], **known}], COLUMNS)
    read = read_csv(path)
    assert len(read) == len(rows) + 1
    assert list(read[0]) == list(COLUMNS)
    for before, after in zip(rows, read, strict=False):
        assert before["p50"] == after["p50"] == "" or after["p50"] == pytest.approx(before["p50"], rel=1e-5)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns"):
        write_csv(path, [{**rows[0], **known}], COLUMNS)
    with pytest.raises(ValueError, match="must have the columns p50, p20, p80, got a, b"):
        read_csv(path)


def test_environment_names_no_machine(monkeypatch):
    known = environment("cpu")
    assert known["torch"] == torch.__version__
    assert all("/" not in value for value in known.values())
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    assert environment("cpu")["commit"] == "abc1234"


def test_command_line(tmp_path, capsys):
    path = tmp_path / "run.csv"
    assert run.main([*ARGUMENTS, "--csv", str(path)]) == 0
    rows = read_csv(path)
    (ceiling,) = [row for row in rows if row["impl"] == "matmul"]
    assert ceiling["p50"] > 0
    assert {row["run"] for row in rows} == {ceiling["run"]}
    assert {row["impl"] for row in rows if row["metric"] == "time" and row["unit"] == "s"} >= {
        "ours_cpu",
        "ours_cpu_off",
        "sdpa",
        "eager",
        "paper",
        "vaug",
    }
    assert run.main([*ARGUMENTS, "--task", "column_mass"]) == 0
    assert "ours_columns" in capsys.readouterr().out
    assert run.main([*ARGUMENTS, "--list"]) == 0
    assert "cannot run: flash_attn.cute is not installed" in capsys.readouterr().out


def test_command_line_fails_on_a_wrong_implementation(monkeypatch, capsys):
    wrong = with_build("sdpa", half_the_mass)
    monkeypatch.setitem(IMPLEMENTATIONS, "sdpa", wrong)
    assert run.main([*ARGUMENTS, "--impls", "sdpa,eager"]) == 1
    assert "RED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "must be a positive int like 512 or 4k, got '0'"),
        (["--lengths", "4x"], "got '4x'"),
        (["--impls", "magic"], "unknown magic; known: ours_cpu"),
        (["--repetitions", "0"], "--repetitions must be at least 1, got 0"),
        (["--shapes", "llama3-8b", "--kinds", "window"], "has no window"),
        (["--impls", "ours_columns"], "task attention does not know ours_columns"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
    ],
)
def test_command_line_rejects(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        run.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_verify_prints_no_speed_up_on_red_tests(capsys, monkeypatch):
    monkeypatch.setattr(verify.run, "main", lambda argv: pytest.fail("timed although the tests are red"))
    status = verify.main(["--", *ARGUMENTS], run_tests=lambda tests: (1, "1 failed, 3 passed"))
    out = capsys.readouterr().out
    assert status == 1
    assert "1 failed" in out and "no speed-up is printed" in out
    assert "over" not in out.replace("no speed-up", "")


def test_verify_times_after_green_tests(capsys):
    order = []
    status = verify.main(
        ["--tests", "-n 0 a", "--", *ARGUMENTS], run_tests=lambda tests: order.append(tests) or (0, "2 passed")
    )
    out = capsys.readouterr().out
    assert status == 0 and order == [["-n", "0", "a"]]
    assert out.index("2 passed") < out.index("time over ours_cpu's: ")


def test_verify_runs_real_tests(tmp_path):
    for body, expected in (("assert True", 0), ("assert False", 1)):
        path = tmp_path / f"test_{expected}.py"
        path.write_text(f"def test_it():\n    {body}\n")
        status, output = verify.run_tests(["-p", "no:xdist", "-o", "addopts=", str(path)])
        assert status == expected
        assert ("1 passed" in output) == (expected == 0)
