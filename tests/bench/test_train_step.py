"""The tool that measures optimizer steps: gate, rows, quantiles, CSV, targets."""

import csv

import pytest

from bench import train_step
from bench.records import environment, write_csv
from bench.train_step_report import COLUMNS, table, target_lines


def options_of(*arguments):
    options = train_step._parser().parse_args(
        ["--model", "tiny", "--device", "cpu", "--lengths", "32", "--steps", "2", *arguments]
    )
    options.train, options.checkpointing = options.train[0], options.checkpointing[0]
    return options


def in_process(step):
    """What a worker process returns, without the process."""

    def run(options, kind, methods, length, train, checkpointing):
        if kind == "memory":
            return train_step.measure_memory(step, methods[0], length)
        errors = train_step.gate(step, methods)
        sound = [m for m in methods if errors.get(m, 0.0) <= train_step.TOLERANCE]
        return {"errors": errors, "times": train_step.measure_times(step, sound, length, options.steps, 60.0)}

    return run


@pytest.fixture(scope="module")
def step():
    return train_step.Step(options_of())


@pytest.fixture(scope="module")
def rows(step):
    return train_step.case_rows(options_of(), 32, "full", "off", in_process(step))


def cell(rows, impl, metric):
    (row,) = [row for row in rows if (row["impl"], row["metric"]) == (impl, metric)]
    return row


def test_every_method_has_its_rows(rows):
    for impl, method in train_step.METHODS.items():
        assert cell(rows, impl, "step_time")["p50"] > 0
        assert cell(rows, impl, "peak_live")["p50"] > 0
        if method.penalty:
            assert cell(rows, impl, "correctness")["unit"] == "pass"
    time, throughput = (cell(rows, "surgery", metric) for metric in ("step_time", "task_throughput"))
    assert time["p20"] <= time["p50"] <= time["p80"]
    # two micro-batches of two sequences of 32 tokens; two repetitions, so the medians are means
    assert throughput["p20"] <= 2 * 2 * 32 / time["p50"] <= throughput["p80"]


def test_surgery_takes_no_more_memory_than_plain(rows):
    plain, ours, paper = (cell(rows, impl, "peak_live")["p50"] for impl in ("plain", "surgery", "paper"))
    assert ours <= 1.02 * plain
    assert paper > plain


def test_a_wrong_method_is_a_red_row_and_never_a_time(step, monkeypatch):
    right = train_step.METHODS["surgery"]
    wrong = right._replace(penalty=lambda *args: 1.001 * right.penalty(*args))
    monkeypatch.setitem(train_step.METHODS, "surgery", wrong)
    rows = train_step.case_rows(options_of("--methods", "surgery,paper"), 32, "full", "off", in_process(step))
    red = cell(rows, "surgery", "correctness")
    assert red["unit"] == "red"
    assert red["p50"] == pytest.approx(1e-3, rel=0.1)
    assert [row["metric"] for row in rows if row["impl"] == "surgery"] == ["correctness"]
    assert cell(rows, "paper", "step_time")["p50"] > 0
    assert "RED" in table(rows)


def test_a_gradient_of_the_wrong_size_is_caught(step, monkeypatch):
    """The value is right, the gradient is not: what a lost or doubled gradient looks like."""
    right = train_step.METHODS["surgery"]

    def penalty(*args):
        value = right.penalty(*args)
        return 2 * value - value.detach()

    monkeypatch.setitem(train_step.METHODS, "surgery", right._replace(penalty=penalty))
    assert train_step.gate(step, ["surgery"])["surgery"] == pytest.approx(1.0, rel=1e-3)


def test_out_of_memory_is_a_row(step, monkeypatch):
    def run(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setitem(train_step.METHODS, "paper", train_step.METHODS["paper"]._replace(run=run))
    times = train_step.measure_times(step, ["plain"], 32, 1, 60.0)
    assert len(times["plain"]) == 1
    assert not train_step._runs(step, "paper", step.inputs(32, 1))
    killed = {"time": {"errors": {}, "times": {"plain": [1.0], "paper": None}}}
    rows = train_step.case_rows(
        options_of("--methods", "plain,paper"), 32, "full", "off", lambda options, kind, *rest: killed.get(kind)
    )
    assert [cell(rows, "paper", metric)["unit"] for metric in ("step_time", "peak_live")] == ["oom", "oom"]
    assert "oom" in table(rows)


def test_other_errors_are_not_taken_for_memory(step, monkeypatch):
    def run(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setitem(train_step.METHODS, "paper", train_step.METHODS["paper"]._replace(run=run))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_step._runs(step, "paper", step.inputs(32, 1))


def test_csv_schema(rows, tmp_path):
    path = tmp_path / "results" / "train_step.csv"
    full = [{**row, **environment("cpu")} for row in rows]
    write_csv(path, full, COLUMNS)
    write_csv(path, full[:1], COLUMNS)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == COLUMNS
    assert len(read) == len(rows) + 1
    assert float(read[-1]["p50"]) == pytest.approx(rows[0]["p50"], rel=1e-5, abs=1e-12)
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="has columns"):
        write_csv(path, full, COLUMNS)


def test_targets_pass_fail_and_say_when_nothing_was_measured():
    common = {"shape": "s", "length": 1024, "batch": 2, "pairs": 1, "mode": "step_accumulation2"}
    common |= {"dtype": "float32", "train": "full", "checkpointing": "off"}
    seconds = {"plain_same_tokens": 10.0, "surgery": 10.4, "paper": 20.0}
    rows = [{**common, "impl": impl, "metric": "step_time", "p50": s} for impl, s in seconds.items()]
    lines = {line.split(":")[0].split("  ")[1]: line.split()[0] for line in target_lines(rows) if ":" in line}
    assert lines == {"time over the paper's way": "FAIL", "time over plain on the same tokens": "pass"}
    assert sum(line.startswith("not measured") for line in target_lines(rows)) == 2


def test_memory_target_falls_back_to_the_estimate_and_says_so():
    common = {"shape": "s", "length": 2048, "batch": 2, "pairs": 1, "mode": "step_accumulation2"}
    common |= {"dtype": "float32", "train": "full", "checkpointing": "off"}
    rows = [
        {**common, "impl": "surgery", "metric": "peak_live", "p50": 3.0},
        {**common, "impl": "paper", "metric": "peak_live", "p50": ""},
        {**common, "impl": "paper", "metric": "peak_estimated", "p50": 10.0},
    ]
    (line,) = [line for line in target_lines(rows) if line.startswith("pass")]
    assert "0.300 <= 0.4 (estimated: paper ran out of memory)" in line


def test_command_line_rejects(capsys):
    for arguments in (["--methods", "magic"], ["--batch", "0"], ["--weights", "demo", "--model", "tiny"]):
        with pytest.raises(SystemExit) as error:
            train_step.main(arguments)
        assert error.value.code == 2
    assert "known: plain" in capsys.readouterr().err
