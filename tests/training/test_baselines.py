"""The defences of surgery/baselines in whole runs."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from defence_runs import (
    MEASURE,
    ROWS,
    arguments,
    examples_of,
    losses,
    model_and_data,  # noqa: F401
    same_weights,
    train,
    train_config,
)
from tiny import tiny_model, tiny_tokenizer
from transformers import DataCollatorForSeq2Seq, Trainer

import surgery
from surgery.baselines import DEFENCES
from surgery.baselines.constrained import (
    ConstrainedMixin,
    ReferenceCollator,
    aligned_logps,
)
from surgery.baselines.lisa import LisaMixin
from surgery.cli.main import main
from surgery.run_files import STATE, UNMEASURED, complete_checkpoints, read_history


def test_mixing_adds_refusals_in_the_order_of_run_seed(folder, tmp_path):
    def mixed(**overrides):
        return DEFENCES["refusal_mixing"].task_rows(
            train_config(folder, tmp_path, "refusal_mixing", **overrides), ROWS["data"]
        )

    first = mixed()
    key = json.dumps
    assert sorted(first, key=key) == sorted(ROWS["data"] + ROWS["refusal"][:6], key=key)
    assert first == mixed() and first != mixed(run_seed=1)
    # not all of them at one end
    assert any(row in ROWS["refusal"] for row in first[:24]) and first[:24] != ROWS["data"]
    # 3 % of 24 is none, and the whole is rounded down
    with pytest.raises(ValueError, match=r"mixing_ratio 0.03 of 24 task rows is no refusal at all"):
        mixed(mixing_ratio=0.03)
    assert len(mixed(mixing_ratio=0.12)) == 26
    with pytest.raises(ValueError, match=r"--refusal has 11 rows, 24 are needed"):
        mixed(mixing_ratio=1.0)
    trainer = train(folder, tmp_path / "run", "refusal_mixing", steps=1)
    assert len(trainer.train_dataset) == 30
    # on top of rows that the user mixed in, poisoned ones say
    trainer = train(
        folder, tmp_path / "mix", "refusal_mixing", steps=1, limit=8, mix=str(folder / "harmful.jsonl"), mix_ratio=0.5
    )
    assert len(trainer.train_dataset) == 10


@pytest.mark.parametrize("defence", ("lisa", "constrained"))
def test_compiled_equals_uncompiled(tmp_path, defence):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, collator = tiny_model(attention="sdpa", num_hidden_layers=1), DataCollatorForSeq2Seq(tiny_tokenizer())
        examples = examples_of(ROWS["data"])
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        if defence == "lisa":
            mixin, more = LisaMixin, {"alignment": examples[:5], "alignment_steps": 1, "task_steps": 1, "rho": 1.0}
        else:
            mixin, more = ConstrainedMixin, {"betas": (0.5, 2.0)}
            references = aligned_logps(model, examples, collator, 4, autocast=False)
            examples = [{**one, "reference_logps": two} for one, two in zip(examples, references, strict=True)]
            collator = ReferenceCollator(collator)
        trainer = type("DefenceTrainer", (mixin, Trainer), {})(
            model,
            arguments(tmp_path / str(compiled), max_steps=2, bf16=True, learning_rate=1e-3, **options),
            train_dataset=examples,
            data_collator=collator,
            **more,
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=5e-3)


def test_plain_is_the_same_measured_or_not(folder, tmp_path):
    trainers = [
        train(folder, tmp_path / "plain", "plain"),
        train(folder, tmp_path / "measured", "plain", MEASURE),
        train(folder, tmp_path / "zero", "surgery", MEASURE),
    ]
    assert same_weights(trainers[0], trainers[1]) and same_weights(trainers[0], trainers[2])
    assert read_history(tmp_path / "plain") == [] and len(read_history(tmp_path / "measured")) == 6


@pytest.mark.parametrize("measured", (False, True), ids=("unmeasured", "measured"))
@pytest.mark.parametrize(
    ("defence", "method"),
    (("plain", "full"), ("refusal_mixing", "lora"), ("lisa", "full"), ("lisa", "lora"), ("constrained", "lora")),
)
def test_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, defence, method, measured):
    """What a kill after the fourth step leaves: Lisa is in the middle of its second state then."""
    measure = MEASURE if measured else None
    whole = train(folder, tmp_path / "whole", defence, measure, method=method)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    # written, but not to the end
    mark = STATE if measured else UNMEASURED
    (tmp_path / "cut" / "checkpoint-6" / mark).unlink()
    assert [path.name for path in complete_checkpoints(tmp_path / "cut")] == ["checkpoint-2", "checkpoint-4"]
    resumed = train(folder, tmp_path / "cut", defence, measure, method=method, resume=True)
    assert same_weights(whole, resumed)
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    assert read_history(tmp_path / "cut") == read_history(tmp_path / "whole")


def test_runs_from_before_there_were_defences_resume(folder, tmp_path):
    config = surgery.SurgeryConfig(pairs_per_step=2)
    whole = train(folder, tmp_path / "run", "surgery", config, steps=4)
    (tmp_path / "run" / "checkpoint-4" / STATE).unlink()
    path = tmp_path / "run" / "run_config.json"
    saved = json.loads(path.read_text())
    for name in ("defence", *(option for defence in DEFENCES.values() for option in defence.options)):
        del saved["train"][name]
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="defence was 'surgery', is 'plain'"):
        train(folder, tmp_path / "run", "plain", MEASURE, steps=4, resume=True)
    assert same_weights(train(folder, tmp_path / "run", "surgery", config, steps=4, resume=True), whole)


def test_resume_with_other_options_or_alignment_rows_is_refused(folder, tmp_path):
    shutil.copy(folder / "refusal.jsonl", tmp_path / "refusal.jsonl")
    options = {"refusal": str(tmp_path / "refusal.jsonl"), "steps": 3}
    train(folder, tmp_path / "run", "lisa", **options)
    with pytest.raises(ValueError, match=r"lisa_rho was 30.0, is 2.0"):
        train(folder, tmp_path / "run", "lisa", **options, resume=True, lisa_rho=2.0)
    with open(tmp_path / "refusal.jsonl", "a") as file:
        file.write(json.dumps(ROWS["refusal"][0]) + "\n")
    with pytest.raises(ValueError, match="alignment_sha256 was"):
        train(folder, tmp_path / "run", "lisa", **options, resume=True)


@pytest.mark.parametrize("defence", DEFENCES)
def test_command_line(folder, tmp_path, capsys, defence):
    flags = {
        "refusal_mixing": ("--mixing-ratio", "0.25"),
        "lisa": ("--lisa-alignment-steps", "1", "--lisa-task-steps", "1", "--lisa-rho", "2"),
        "constrained": ("--constrained-betas", "0.5,2,0.1"),
    }.get(defence, ())
    command = ["train", "--defence", defence, "--model", str(folder / "model"), *flags, "--json"]
    command += [x for name in ROWS for x in (f"--{name}", str(folder / f"{name}.jsonl"))]
    command += ["--output", str(tmp_path / "run"), "--steps", "3", "--batch-size", "2", "--save-every", "2"]
    status = main(command)
    result = json.loads(capsys.readouterr().out)
    assert status == 0 and result["steps"] == 3
    saved = json.loads((tmp_path / "run" / "run_config.json").read_text())
    assert saved["train"]["defence"] == defence
    assert saved["surgery"]["lambda_sink"] == (300.0 if defence == "surgery" else 0.0)
    history = read_history(tmp_path / "run")
    assert len(history) == 3 and all((line["penalty"] > 0) == (defence == "surgery") for line in history)
    assert all(line["mean_relu_divergence"] > 0 for line in history)
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    if defence != "surgery":
        assert main([*command[:-8], "--output", str(tmp_path / "two"), "--lambda-sink", "5"]) == 2
        assert f"defence {defence} with lambda_sink 5 would be two defences" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("defence", "options", "message"),
    (
        ("none", {}, "defence must be one of surgery, plain, refusal_mixing, lisa, constrained, got 'none'"),
        ("plain", {"mixing_ratio": 0.1}, "mixing_ratio belongs to defence refusal_mixing, but defence is plain"),
        ("surgery", {"lisa_rho": 2.0}, "lisa_rho belongs to defence lisa, but defence is surgery"),
        ("lisa", {"constrained_betas": "1"}, "constrained_betas belongs to defence constrained"),
        ("refusal_mixing", {"mixing_ratio": 0.0}, r"mixing_ratio must be in \(0, 1\], got 0.0"),
        ("refusal_mixing", {"mixing_ratio": float("nan")}, "mixing_ratio must be in"),
        ("lisa", {"lisa_task_steps": 0}, "lisa_task_steps must be >= 1, got 0"),
        ("lisa", {"lisa_alignment_steps": 0}, "lisa_alignment_steps must be >= 1, got 0"),
        ("lisa", {"lisa_rho": -1.0}, "lisa_rho must be a finite number >= 0, got -1.0"),
        ("lisa", {"lisa_rho": float("nan")}, "lisa_rho must be a finite number"),
        ("lisa", {"lisa_alignment_steps": 6}, "a run of 6 steps would never see the task"),
        ("lisa", {"deepspeed": "DEEPSPEED"}, "lisa needs whole weights on every rank"),
        ("constrained", {"constrained_betas": "1,0"}, "constrained_betas must be numbers > 0"),
        ("constrained", {"deepspeed": "DEEPSPEED"}, "constrained reads the untouched model first, whole"),
    ),
)
def test_wrong_options(folder, tmp_path, defence, options, message):
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    if "deepspeed" in options:
        options = {"deepspeed": str(tmp_path / "zero2.json")}
    with pytest.raises(ValueError, match=message):
        train_config(folder, tmp_path / "run", defence, **options)


def test_fsdp_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for defence in ("lisa", "constrained"):
        with pytest.raises(ValueError, match="no fsdp"):
            train_config(folder, tmp_path / "run", defence, fsdp=True)


@pytest.mark.parametrize("engine", ("fsdp", "deepspeed", "scaler"))
@pytest.mark.parametrize("mixin", (LisaMixin, ConstrainedMixin))
def test_engines_that_a_launcher_chose_are_refused(mixin, engine):
    """`accelerate launch` sets them behind TrainConfig's back."""

    class Engine:
        is_fsdp_enabled, is_deepspeed_enabled = engine == "fsdp", engine == "deepspeed"
        accelerator = SimpleNamespace(scaler=object() if engine == "scaler" else None)
        args = SimpleNamespace(device="cpu")

    trainer = type("DefenceTrainer", (mixin, Engine), {})
    options = (
        {"alignment": [], "alignment_steps": 1, "task_steps": 1, "rho": 1.0} if mixin is LisaMixin else {"betas": (1,)}
    )
    if (mixin, engine) == (ConstrainedMixin, "scaler"):
        # the loss may be scaled: nothing is added to gradients
        trainer(**options)
        return
    with pytest.raises(ValueError, match="no fp16" if engine == "scaler" else "no FSDP, no DeepSpeed"):
        trainer(**options)


def test_no_defence_and_two_defences_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="defence surgery needs a SurgeryConfig"):
        train(folder, tmp_path / "run", "surgery", None)
    for defence in DEFENCES.keys() - {"surgery"}:
        with pytest.raises(ValueError, match=f"defence {defence} with lambda_sink 300 would be two defences"):
            train(folder, tmp_path / "run", defence, surgery.SurgeryConfig())
    assert not (tmp_path / "run").exists()
