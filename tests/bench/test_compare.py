"""Regressions beyond the noise, and the table of targets, on rows whose right answer is known."""

import pytest

from bench import compare, targets
from bench.records import ENVIRONMENT, write_csv
from bench.run import COLUMNS
from bench.train_step_report import TARGETS

BLANK = dict.fromkeys(COLUMNS, "")


def row(impl="ours_triton", mode="both", p50=1.0, spread=0.01, unit="s", metric="time", **other):
    values = {"p50": "", "p20": "", "p80": ""}
    if p50 != "":
        values = {"p50": p50, "p20": p50 * (1 - spread), "p80": p50 * (1 + spread)}
    case = {"shape": "llama3-8b", "kind": "causal", "length": "1024", "batch": "16", "dtype": "bfloat16"}
    known = {"impl": impl, "mode": mode, "metric": metric, "unit": unit, "device": "NVIDIA H100", "driver": "580"}
    return BLANK | case | known | {"run": "1"} | values | other


def words(before, after, **options):
    return [word for word, _, _ in compare.compare(before, after, **options)]


@pytest.mark.parametrize(
    ("p50", "spread", "word"),
    [
        (1.00, 0.01, "same"),
        # apart, and by more than the threshold
        (1.10, 0.01, "regression"),
        (0.90, 0.01, "better"),
        # apart, but by less than the threshold
        (1.015, 0.001, "same"),
        # further than the threshold, but the bands overlap
        (1.10, 0.12, "same"),
    ],
)
def test_noise(p50, spread, word):
    assert words([row(spread=0.001 if p50 == 1.015 else 0.01)], [row(p50=p50, spread=spread)]) == [word]


def test_the_threshold_can_be_chosen():
    assert words([row()], [row(p50=1.1)], threshold=0.2) == ["same"]


def test_bytes_need_no_band():
    before = row(metric="peak", unit="byte", p50=1000.0, spread=0)
    assert words([before], [before | {"p50": 1100.0, "p20": 1100.0, "p80": 1100.0}]) == ["regression"]


def test_rates_are_not_counted_twice():
    rate = row(metric="throughput", unit="TFLOP/s", p50=500.0)
    assert words([row(), rate], [row(), rate | {"p50": 100.0, "p20": 99.0, "p80": 101.0}]) == ["same"]


def test_correct_to_red_is_a_regression_and_red_to_correct_is_none():
    right, red = row(metric="correctness", unit="pass", p50=0.5), row(metric="correctness", unit="red", p50=7.0)
    assert words([right, row()], [red, row()]) == ["regression", "same"]
    assert words([red, row()], [right, row()]) == ["same"]
    # a larger error within the limit is none either
    assert words([right, row()], [right | {"p50": 0.9}, row()]) == ["same"]


def test_what_is_gone_is_a_regression_unless_allowed():
    other = row("flex")
    (found,) = [f for f in compare.compare([row(), other], [row()]) if f[0] == "regression"]
    assert found[1].startswith("flex") and found[2] == "gone"
    assert words([row(), other], [row()], allow_missing=True) == ["same"]
    (found,) = [f for f in compare.compare([other, row()], [row(), row("flex", "", "", unit="oom")]) if "flex" in f[1]]
    assert found[2] == "is now oom"


def test_the_last_row_of_a_key_counts():
    assert words([row(p50=9.0), row()], [row(p50=9.0), row(p50=1.001)]) == ["same"]


def test_files_that_say_nothing_about_each_other_are_refused():
    with pytest.raises(ValueError, match="one device, got"):
        compare.compare([row()], [row(device="NVIDIA A100")])
    with pytest.raises(ValueError, match="share no row"):
        compare.compare([row()], [row("flex")])


def test_exit_status(tmp_path, capsys):
    a, b, wrong = (tmp_path / name for name in ("a.csv", "b.csv", "wrong.csv"))
    write_csv(a, [row()], COLUMNS)
    write_csv(b, [row(p50=1.2)], COLUMNS)
    wrong.write_text("x,y\n1,2\n")
    assert compare.main([str(a), str(a)]) == 0
    assert compare.main([str(a), str(b)]) == 1
    assert "regression  ours_triton both llama3-8b causal 1024 16 bfloat16 time: 1 to 1.2 s (x 1.200)" in (
        capsys.readouterr().out
    )
    assert compare.main([str(b), str(a)]) == 0
    assert compare.main([str(a), str(wrong)]) == 2
    assert compare.main([str(a), str(tmp_path / "none.csv")]) == 2


def test_environment_is_no_part_of_a_key():
    assert set(ENVIRONMENT) <= compare.NOT_KEY


def pair(ratios, **other):
    """Times of ours with and without the statistic, one pair a mode."""
    rows = []
    for mode, ratio in ratios.items():
        rows += [row(mode=mode, p50=ratio, **other), row("ours_triton_off", mode, 1.0, **other)]
    return rows


def test_on_off():
    good = pair({"forward": 1.005, "backward": 1.01, "both": 1.008})
    (line,) = targets.on_off_lines(good)
    assert line.startswith("pass  ours_triton: forward 1.005, both 1.008, backward 1.010 <= 1.01")
    (line,) = targets.on_off_lines(pair({"forward": 1.005, "backward": 1.02}))
    assert line.startswith("FAIL")
    # short sequences and CPUs have no target
    assert "no target" in targets.on_off_lines(pair({"forward": 1.5, "backward": 1.5}, length="512"))[0]
    assert "no target" in targets.on_off_lines(pair({"forward": 1.5, "backward": 1.5}, driver=""))[0]
    assert targets.on_off_lines([row()])[0].startswith("not measured")


def test_ratios_stay_within_a_run():
    rows = pair({"forward": 1.0, "backward": 1.0}) + pair({"forward": 2.0, "backward": 2.0}, run="2")
    assert [line.split()[0] for line in targets.on_off_lines(rows)] == ["pass", "FAIL"]
    assert targets.peer_lines([row(), row("flex", p50=2.0, run="2")])[-1].startswith("not measured")


def test_peers():
    rows = [row(), row("ours_triton_off", p50=0.9), row("flex", p50=1.5), row("fa4", p50=0.8)]
    rows += [row("eager", "", "", unit="oom"), row("paper", "", 3.0, unit="red", metric="correctness")]
    first, target = targets.peer_lines(rows)
    assert "time over ours_triton's: fa4 0.80, flex 1.50, eager oom, paper red (llama3-8b causal 1024" in first
    assert target.startswith("pass  flex over ours_triton: 1.50 >= 1.3")
    assert targets.peer_lines([row(), row("flex", p50=1.2)])[1].startswith("FAIL")


def test_throughput():
    cells = {"metric": "throughput", "unit": "TFLOP/s", "length": "8192"}
    rows = [row(mode="forward", p50=512.0, **cells), row(mode="backward", p50=400.0, **cells)]
    lines = targets.throughput_lines(rows)
    assert lines[0] == "pass  ours_triton forward head dim 128: 512 >= 500 TFLOP/s"
    assert lines[2] == "FAIL  ours_triton backward head dim 128: 400 >= 420 TFLOP/s"
    assert [line.startswith("not measured") for line in lines] == [False, True, False, True]
    elsewhere = [{**each, "device": "NVIDIA A10"} for each in rows]
    assert all(line.startswith("not measured") for line in targets.throughput_lines(elsewhere))


def test_no_speed_up_on_red_tests():
    rows = [*pair({"forward": 1.0, "backward": 1.0}), row(), row("flex", p50=2.0)]
    red = targets.report(rows, tests="FAILED (1)")
    assert red == ["tests: FAILED (1)", "no speed-up is printed while the tests are red"]
    assert any("flex 2.00" in line for line in targets.report(rows, tests="ok"))
    wrong = row("fa4", "", 9.0, unit="red", metric="correctness", note="worst: dk")
    assert targets.report([wrong], tests="ok")[1] == "RED  fa4 (llama3-8b causal 1024 bfloat16): worst: dk"


def test_everything_missing_is_said(capsys, tmp_path):
    assert targets.main(["--run", str(tmp_path / "none.csv")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tests: not run")
    assert out.count("not measured") == 1 + 1 + 4 + 2
    assert len(TARGETS) == 4
