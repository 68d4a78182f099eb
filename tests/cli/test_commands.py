"""The command line on a tiny model folder: every command, wrong input, and a run killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tiny import rows, tiny_model, tiny_tokenizer

from surgery.cli.main import COMMANDS, main
from surgery.run_files import complete_checkpoints, read_history


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and data files."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model(attention="sdpa").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, seed, words in (("data", 1, 5), ("harmful", 2, 8), ("refusal", 3, 4), ("mix", 4, 5)):
        text = "".join(json.dumps(row) + "\n" for row in rows(20, seed, response_words=words))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def train_flags(folder, output, *more):
    files = [x for name in ("data", "harmful", "refusal") for x in (f"--{name}", str(folder / f"{name}.jsonl"))]
    return [
        "train",
        *("--model", str(folder / "model"), *files, "--output", str(output)),
        *("--steps", "4", "--batch-size", "2", "--learning-rate", "1e-3", "--no-bf16", "--log-every", "1"),
        *("--save-every", "2", "--pairs-per-step", "2", "--probe-max-length", "32", "--max-length", "32"),
        *more,
    ]


def run_json(capsys, *argv):
    capsys.readouterr()
    status = main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text and len(text) > 300


def test_train_and_plot(folder, tmp_path, capsys):
    for name, value in (("plain", "0"), ("surgery", "300")):
        status, result = run_json(capsys, *train_flags(folder, tmp_path / name, "--lambda-sink", value))
        assert status == 0 and result["steps"] == 4
    assert (result["penalty_last_fifth"] > 0) and (tmp_path / "surgery/model/model.safetensors").is_file()
    runs = [str(tmp_path / name) for name in ("plain", "surgery")]
    status, result = run_json(capsys, "plot", *runs, "--output", str(tmp_path / "figures"), "--format", "svg")
    assert status == 0
    figures = {"mean_relu_divergence.svg", "positive_heads.svg"}
    figures |= {f"{kind}_{name}.svg" for kind in ("head_map", "trajectories") for name in ("plain", "surgery")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {*figures, "curves.csv"}
    assert all((tmp_path / "figures" / name).stat().st_size > 2000 for name in figures)
    lines = (tmp_path / "figures" / "curves.csv").read_text().splitlines()
    history = {name: read_history(tmp_path / name) for name in ("plain", "surgery")}
    assert len(lines) == 9 and lines[0] == "run,step,mean_relu_divergence,positive_heads"
    # plain fine-tuning has no penalty, but its divergence is measured
    assert all(line["penalty"] == 0 < line["mean_relu_divergence"] for line in history["plain"])
    assert (
        lines[8]
        == f"surgery,4,{history['surgery'][3]['mean_relu_divergence']:.6g},{history['surgery'][3]['positive_heads']}"
    )
    trained = json.loads((tmp_path / "surgery" / "run_config.json").read_text())
    assert trained["surgery"]["pairs_per_step"] == 2 and trained["train"]["learning_rate"] == 1e-3


def test_config_file_and_flags(folder, tmp_path, capsys):
    options = {
        "model": str(folder / "model"),
        **{name: str(folder / f"{name}.jsonl") for name in ("data", "harmful", "refusal", "mix")},
        "mix_ratio": 0.25,
        "limit": 8,
        "method": "lora",
        "steps": 2,
        "bf16": False,
        "surgery": {"lambda_sink": 10.0, "pairs_per_step": 1, "sinks": 1},
    }
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    output = tmp_path / "run"
    status, _ = run_json(
        capsys, "train", "--config", str(tmp_path / "run.yaml"), "--output", str(output), "--lambda-sink", "20"
    )
    assert status == 0
    saved = json.loads((output / "run_config.json").read_text())
    assert saved["surgery"]["lambda_sink"] == 20.0 and saved["surgery"]["sinks"] == 1
    assert (output / "model" / "adapter_model.safetensors").is_file()


def test_upstream_preset_warns_about_its_reference_set(folder, tmp_path, capsys, caplog):
    status, _ = run_json(capsys, *train_flags(folder, tmp_path / "run", "--preset", "upstream", "--steps", "1"))
    assert status == 0
    saved = json.loads((tmp_path / "run" / "run_config.json").read_text())["surgery"]
    # a flag wins over the preset, the rest is the preset's
    assert (saved["sinks"], saved["double_bos"], saved["pairs_per_step"]) == (1, True, 2)
    assert "merely safe answers there, which leave hardly a head to act on" in caplog.text


def test_measure(folder, tmp_path, capsys):
    flags = ["measure", "--model", str(folder / "model"), "--limit", "7", "--batch-size", "3"]
    flags += [x for name in ("harmful", "refusal") for x in (f"--{name}", str(folder / f"{name}.jsonl"))]
    status, result = run_json(capsys, *flags, "--output", str(tmp_path), "--sinks", "1")
    assert status == 0 and result["heads"] == 12 and result["sequences_harmful"] == 7
    arrays = np.load(tmp_path / "measurement.npz")
    assert arrays["harmful"].shape == (3, 7, 4)
    # against attention maps, row by row: batches are sorted by length, the order must come back
    from surgery.data import RowEncoder, read_rows

    model, encoder = tiny_model().eval(), RowEncoder(tiny_tokenizer(), 512)
    for i, row in enumerate(read_rows(folder / "harmful.jsonl", 7)):
        maps = model(torch.tensor([encoder.encode(row).input_ids]), output_attentions=True, use_cache=False).attentions
        expected = torch.stack([a[0, :, 1:, 0].mean(-1) for a in maps])
        np.testing.assert_allclose(arrays["harmful"][:, i], expected.detach().numpy(), rtol=1e-4, atol=1e-6)
    d = arrays["harmful"].mean(1) - arrays["refusal"].mean(1)
    assert result["positive_heads"] == int((d > 0).sum())
    assert len((tmp_path / "divergence.csv").read_text().splitlines()) == 13
    assert (tmp_path / "head_map.png").is_file()
    status, result = run_json(
        capsys, "plot", "--measurement", str(tmp_path / "measurement.npz"), "--output", str(tmp_path / "figures")
    )
    assert status == 0 and (tmp_path / "figures" / "head_map.png").is_file()


@pytest.mark.parametrize("method", ("full", "lora"))
@pytest.mark.parametrize("checkpointing", ("off", "reentrant"))
def test_verify(folder, capsys, method, checkpointing):
    flags = ["verify", "--model", str(folder / "model"), "--method", method, "--rows", "response"]
    flags += [x for name in ("harmful", "refusal") for x in (f"--{name}", str(folder / f"{name}.jsonl"))]
    status, result = run_json(capsys, *flags, "--gradient-checkpointing", checkpointing)
    assert status == 0 and result["passed"] and 0 < result["worst_error"] < 1e-4
    assert result["penalty"] == pytest.approx(result["eager_penalty"], rel=1e-4)
    status, result = run_json(capsys, *flags, "--tolerance", "1e-12")
    assert status == 1 and not result["passed"]


def test_verify_bf16_is_held_against_the_noise_of_eager(folder, capsys):
    flags = ["verify", "--model", str(folder / "model"), "--bf16"]
    flags += [x for name in ("harmful", "refusal") for x in (f"--{name}", str(folder / f"{name}.jsonl"))]
    status, result = run_json(capsys, *flags)
    assert status == 0 and result["noise_floor"] > 1e-3


def test_verify_notices_a_lost_gradient(folder, capsys, monkeypatch):
    from surgery import penalty_op

    true_divergence = penalty_op.head_divergence
    monkeypatch.setattr(penalty_op, "head_divergence", lambda alpha, n: true_divergence(alpha, n) - 1)
    flags = ["verify", "--model", str(folder / "model")]
    flags += [x for name in ("harmful", "refusal") for x in (f"--{name}", str(folder / f"{name}.jsonl"))]
    status, result = run_json(capsys, *flags)
    assert status == 1 and result["worst_error"] > 0.5


def test_estimate_and_env(folder, capsys):
    flags = ["--model", str(folder / "model"), "--task-length", "64", "--probe-length", "32", "--probe-pairs", "1"]
    status, result = run_json(capsys, "estimate", *flags, "--lora", "2", "--dtype", "float32")
    assert status == 0 and set(result) == {"plain", "surgery", "paper"}
    assert result["surgery"]["total"] <= 1.02 * result["plain"]["total"] < result["paper"]["total"]
    status, result = run_json(capsys, "env")
    assert status == 0 and result["backends"]["training, bf16"]["auto"] in ("cpu", "triton")


@pytest.mark.parametrize(
    ("more", "message"),
    (
        (["--lambda-sink", "-1"], "lambda_sink must be >= 0"),
        (["--lambda-sink", "nan"], "finite"),
        (["--harmful", "none.jsonl"], "none.jsonl: no such file"),
        (["--model", "no/such-model"], "cannot load a model"),
        (["--mix-ratio", "0.5"], "mix and mix_ratio go together"),
        (["--steps", "0"], "steps must be >= 1, got 0"),
        (["--sinks", "first"], "sinks must be 'argmax'"),
        (["--config", "none.yaml"], "no such config file"),
        (["--resume"], "holds no run to resume"),
        (["--limit", "30", "--mix", "MIX", "--mix-ratio", "0.1"], "data has 20 rows, 27 are needed"),
    ),
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input(folder, tmp_path, capsys, more, message):
    more = [str(folder / "mix.jsonl") if x == "MIX" else x for x in more]
    assert main(train_flags(folder, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err


def test_wrong_choices_are_refused_by_the_parser(folder, tmp_path):
    for flag in ("--preset", "--backend", "--rows", "--method"):
        with pytest.raises(SystemExit) as stop:
            main(train_flags(folder, tmp_path / "run", flag, "wrong"))
        assert stop.value.code == 2


def test_output_that_exists_and_resume_with_another_config(folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(train_flags(folder, output, "--steps", "2")) == 0
    assert main(train_flags(folder, output, "--steps", "2")) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(train_flags(folder, output, "--steps", "2", "--resume", "--learning-rate", "5e-3")) == 2
    assert "learning_rate was 0.001, is 0.005" in capsys.readouterr().err
    assert main(train_flags(folder, output, "--steps", "2", "--resume", "--lambda-sink", "5")) == 2
    assert "lambda_sink was 300.0, is 5.0" in capsys.readouterr().err
    text = (folder / "data.jsonl").read_text(encoding="utf-8")
    try:
        (folder / "data.jsonl").write_text(text.replace("w1", "w2"), encoding="utf-8")
        assert main(train_flags(folder, output, "--steps", "2", "--resume")) == 2
    finally:
        (folder / "data.jsonl").write_text(text, encoding="utf-8")
    assert "task_sha256 was" in capsys.readouterr().err


def test_a_run_that_fails_on_its_input_leaves_no_run_behind(folder, tmp_path, capsys):
    output = tmp_path / "run"
    (tmp_path / "empty.jsonl").write_text("")
    assert main(train_flags(folder, output, "--harmful", str(tmp_path / "empty.jsonl"))) == 2
    assert "empty.jsonl: the file holds no rows" in capsys.readouterr().err
    assert main(train_flags(folder, output, "--steps", "1")) == 0
    manifest = json.loads((output / "surgery_manifest.json").read_text())
    assert len(manifest["data"]["task_sha256"]) == 64 and manifest["train"]["steps"] == 1


def test_unknown_option_in_a_config_file(folder, tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"learning_rat": 1, "surgery": {}}')
    assert main(train_flags(folder, tmp_path / "run", "--config", str(tmp_path / "run.json"))) == 2
    assert "unknown options ['learning_rat']" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_run_resumes_and_equals_an_uninterrupted_one(folder, tmp_path):
    """kill -9 as soon as the first checkpoint is being followed by further steps."""
    flags = ["--steps", "60", "--save-every", "5", "--save-limit", "3"]
    command = [sys.executable, "-m", "surgery"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(output, *more):
        argv = [*command, *train_flags(folder, output, *flags, *more)]
        return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole = start(tmp_path / "whole")
    cut = start(tmp_path / "cut")
    deadline = time.time() + 120
    while len(read_history(tmp_path / "cut")) < 8 and time.time() < deadline and cut.poll() is None:
        time.sleep(0.02)
    cut.send_signal(signal.SIGKILL)
    assert cut.wait() == -signal.SIGKILL
    # a checkpoint cut off in the middle of its writing is passed over
    broken = tmp_path / "cut" / "checkpoint-999"
    broken.mkdir()
    (broken / "trainer_state.json").write_text("{")
    last = int(complete_checkpoints(tmp_path / "cut")[-1].name.split("-")[1])
    assert 5 <= last < 60
    resumed = start(tmp_path / "cut", "--resume")
    for process in (whole, resumed):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
    assert read_history(tmp_path / "cut") == read_history(tmp_path / "whole")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
