"""verify in an engine: what reaches the optimizer against eager autograd, and the command under torchrun."""

import json
import subprocess
import sys

import pytest
from ranks import environment, run_ranks
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow


def test_verify_injected(tmp_path):
    pytest.importorskip("deepspeed")
    first, second = run_ranks("verify_run.py", folder=tmp_path)
    assert first == second
    wrong = first.pop("wrong")
    for name, (error, value, eager, passed) in first.items():
        assert passed and error <= 1e-5, name
        assert value == pytest.approx(eager, rel=1e-5) and value > 0.1
    # one rank's gradient is too large by a thousandth
    assert not wrong[3] and 1e-4 < wrong[0] < 1e-2


def test_command_under_torchrun(tmp_path):
    tiny_model(attention="sdpa").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "surgery", "verify"]
    options = ["--model", str(tmp_path / "model"), "--engine", "fsdp2", "--method", "lora", "--json"]
    done = subprocess.run(
        [sys.executable, *command, *options], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["passed"] and 0 < result["worst_error"] < 1e-5
    assert result["penalty"] == pytest.approx(result["eager_penalty"], rel=1e-4)


def test_engine_and_torchrun_go_together(capsys):
    from surgery.cli.main import main

    assert main(["verify", "--engine", "fsdp2"]) == 2
    assert "--engine and torchrun go together" in capsys.readouterr().err
