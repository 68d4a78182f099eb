"""`surgery train` under torchrun: a rank that is killed, resume, another number of ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from ranks import environment
from tiny import rows, tiny_model, tiny_tokenizer

from surgery.run_files import complete_checkpoints, read_history

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and data files."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_model(attention="sdpa").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, seed, words in (("data", 1, 5), ("harmful", 2, 8), ("refusal", 3, 4)):
        text = "".join(json.dumps(row) + "\n" for row in rows(40, seed, response_words=words))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def start(folder, output, ranks, *more, steps=STEPS):
    """`surgery train` on `ranks` processes with the same global batches whatever their number."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    files = [x for name in ("data", "harmful", "refusal") for x in (f"--{name}", str(folder / f"{name}.jsonl"))]
    options = [
        *("--model", str(folder / "model"), *files, "--output", str(output), "--divergence", "global"),
        *("--steps", str(steps), "--batch-size", str(4 // ranks), "--pairs-per-step", str(4 // ranks)),
        *("--accumulation", "2", "--learning-rate", "1e-3", "--no-bf16", "--log-every", "1", "--save-every", "2"),
        *("--probe-max-length", "32", "--max-length", "32", "--json", *more),
    ]
    command = [sys.executable, *launcher, "-m", "surgery", "train", *options]
    log = open(output.with_suffix(".log"), "a", encoding="utf-8")  # noqa: SIM115
    return subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process, timeout=180):
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def values(output):
    """Penalty of every step of the history and loss of every step that Trainer logged since the last start."""
    history = read_history(output)
    state = json.loads((complete_checkpoints(output)[-1] / "trainer_state.json").read_text())
    losses = {line["step"]: line["loss"] for line in state["log_history"] if "loss" in line}
    return [line["penalty"] for line in history], [losses[step] for step in sorted(losses)]


def children(process):
    """Process ids of the ranks of a torchrun."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_killed_rank_ends_the_run_which_resumes_on_any_number_of_ranks(folder, tmp_path):
    whole, killed, alone = tmp_path / "whole", tmp_path / "killed", tmp_path / "alone"
    assert finish(start(folder, whole, 2)) == 0, (tmp_path / "whole.log").read_text()[-2000:]
    expected = values(whole)
    assert [len(part) for part in expected] == [STEPS, STEPS] and expected[0][0] > 0.1

    # a long run, so that the kill comes in its middle
    process = start(folder, killed, 2, steps=1000)
    deadline = time.monotonic() + 120
    while not complete_checkpoints(killed) and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks = children(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    killed_at = time.monotonic()
    assert finish(process) != 0
    assert time.monotonic() - killed_at < 60

    # what the kill left, as a run of STEPS steps: back to the first checkpoint
    for checkpoint in complete_checkpoints(killed)[1:]:
        shutil.rmtree(checkpoint)
    config = json.loads((killed / "run_config.json").read_text())
    config["train"]["steps"] = STEPS
    (killed / "run_config.json").write_text(json.dumps(config))
    shutil.copytree(killed, alone)

    assert finish(start(folder, killed, 2, "--resume")) == 0, (tmp_path / "killed.log").read_text()[-2000:]
    assert values(killed) == expected

    # and on one process, with twice the sequences and pairs on it
    assert finish(start(folder, alone, 1, "--resume")) == 0, (tmp_path / "alone.log").read_text()[-2000:]
    for found, wanted in zip(values(alone), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4)

    # another number of sequences a step is refused
    assert finish(start(folder, killed, 1, "--resume", "--accumulation", "1")) == 2
    message = "cannot resume on 1 ranks with 4 task sequences a step, it was 8"
    assert message in (tmp_path / "killed.log").read_text()
