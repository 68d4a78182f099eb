"""gpu.sh and cpu.sh: shell syntax, and a whole dry run on the CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.records import read_csv

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = sorted(BENCH.glob("*.sh"))


def bash(script, *arguments, **variables):
    ours = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    environment = {**os.environ, **ours, **{name: str(value) for name, value in variables.items()}}
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is no dry run")
def test_gpu_script_on_a_cpu(tmp_path):
    out = tmp_path / "out"
    done = bash(BENCH / "gpu.sh", OUT=out)
    assert done.returncode == 0, done.stderr
    summary = (out / "summary.txt").read_text()
    parts = ("environment", "tests", "on_off_tiny", "peers_tiny", "memory", "columns", "step_large")
    for part in parts:
        (line,) = [line for line in summary.splitlines() if line.startswith(part + " ")]
        assert line.endswith(" ok"), f"{summary}\n{(out / 'log.txt').read_text()[-3000:]}"
    # what was measured is there as CSV, and few enough files to carry
    assert {row["impl"] for row in read_csv(out / "run.csv")} >= {"matmul", "ours_cpu", "ours_cpu_off", "paper", "flex"}
    assert read_csv(out / "memory.csv") and read_csv(out / "train_step.csv")
    assert len(list(out.iterdir())) <= 8
    targets = (out / "targets.txt").read_text()
    assert targets.startswith("tests: ok")
    for heading in ("time with the statistic over time without", "peers, forward and backward", "memory", "whole step"):
        assert f"\n{heading}\n" in targets
    assert done.stdout.rstrip().endswith(summary.rstrip())


def test_gpu_script_ends_in_time_and_needs_a_folder(tmp_path):
    done = bash(BENCH / "gpu.sh", OUT=tmp_path, SECONDS_IN_ALL=1)
    assert done.returncode == 0
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.count("skipped, no time left") == 7
    # readable although nothing ran
    assert "not measured" in (tmp_path / "targets.txt").read_text()
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    done = subprocess.run(["bash", str(BENCH / "gpu.sh")], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "set OUT to a folder" in done.stderr


@pytest.mark.slow
def test_cpu_script(tmp_path):
    # a part replaces its file
    (tmp_path / "run.csv").write_text("old\n")
    small = {"SHAPE": "tiny", "LENGTHS": "32,64,128,256"}
    done = bash(BENCH / "cpu.sh", "run", "memory", RESULTS=tmp_path, **small)
    assert done.returncode == 0, done.stderr
    assert {row["dtype"] for row in read_csv(tmp_path / "run.csv")} == {"bfloat16", "float32"}
    assert len(read_csv(tmp_path / "memory.csv")) == 4 * 6
    done = bash(BENCH / "cpu.sh", "magic", RESULTS=tmp_path)
    assert done.returncode == 2 and "known: run, train_step, memory" in done.stderr
