"""SurgeryCallback and SurgeryTrainer on a real Trainer: gradients, metrics, lambda 0, resume, files."""

import json
import shutil
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from tiny import rows, tiny_model, tiny_tokenizer, worst_error
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

import surgery
from surgery.data import ProbeData, RowEncoder, task_examples
from surgery.run_files import HISTORY, STATE, complete_checkpoints, read_history

HARMFUL, REFUSAL = rows(9, seed=10, response_words=8), rows(7, seed=11, response_words=4)


def arguments(folder, **overrides):
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**options, **overrides})


def parts(folder, model=None, **overrides):
    """Keyword arguments of a Trainer on a tiny model and tokenizer."""
    tokenizer = tiny_tokenizer()
    return {
        "model": tiny_model(attention="sdpa") if model is None else model,
        "args": arguments(folder, **overrides),
        "train_dataset": task_examples(rows(24, seed=5), RowEncoder(tokenizer, 32)),
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "processing_class": tokenizer,
    }


def surgery_trainer(folder, config=None, model=None, **overrides):
    config = config or surgery.SurgeryConfig(pairs_per_step=2)
    return surgery.SurgeryTrainer(
        **parts(folder, model, **overrides), surgery_config=config, harmful=HARMFUL, refusal=REFUSAL
    )


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", (False, True), ids=("no-ckpt", "ckpt"))
@pytest.mark.parametrize("accumulation", (1, 3))
def test_gradient_is_task_plus_penalty_once(tmp_path, accumulation, checkpointing):
    """Whatever the accumulation, the optimizer sees the task's gradient plus one penalty gradient."""
    seen = []
    for run in ("plain", "surgery"):
        keep = KeepGradients()
        options = {
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "gradient_checkpointing": checkpointing,
        }
        if run == "plain":
            trainer = Trainer(**parts(tmp_path / run, **options))
        else:
            trainer = surgery_trainer(tmp_path / run, **options)
        trainer.add_callback(keep)
        trainer.train()
        seen.append(keep.steps[0])
    config = surgery.SurgeryConfig(pairs_per_step=2)
    model = surgery.patch_model(tiny_model())
    batches = ProbeData(HARMFUL, REFUSAL, tiny_tokenizer(), config).batches(0)
    penalty = surgery.SurgeryRegularizer(model, config)(*batches)
    assert penalty > 0
    penalty.backward()
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    plain, both = seen
    assert worst_error({name: both[name] - plain[name] for name in both}, alone) <= 1e-4


def test_lambda_zero_is_bit_identical_to_plain_trainer(tmp_path):
    torch.manual_seed(0)
    plain = Trainer(**parts(tmp_path / "plain", save_strategy="no"))
    plain.train()
    torch.manual_seed(0)
    config = surgery.SurgeryConfig(lambda_sink=0.0, pairs_per_step=2)
    ours = surgery_trainer(tmp_path / "ours", config, save_strategy="no")
    ours.train()
    for name, weight in weights(plain.model).items():
        assert torch.equal(weight, weights(ours.model)[name]), name
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (plain, ours)]
    assert losses[0] == losses[1]
    # and it has measured all the same
    history = read_history(tmp_path / "ours")
    assert [line["step"] for line in history] == [1, 2, 3, 4, 5, 6]
    assert any(line["positive_heads"] for line in history) and all(line["penalty"] == 0 for line in history)


def test_lambda_zero_with_lora_dropout_is_bit_identical(tmp_path):
    """The probe's dropout must not move the task's random numbers."""
    from peft import LoraConfig, get_peft_model

    final = []
    for run in ("plain", "ours"):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2)
        model = get_peft_model(tiny_model(attention="sdpa"), lora)
        if run == "plain":
            trainer = Trainer(**parts(tmp_path / run, model, save_strategy="no"))
        else:
            config = surgery.SurgeryConfig(lambda_sink=0.0)
            trainer = surgery_trainer(tmp_path / run, config, model, save_strategy="no")
        trainer.train()
        final.append(weights(model))
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_penalty_falls(tmp_path):
    """The regulariser does what it is for: with a small task the heads leave the positive side."""
    trainer = surgery_trainer(tmp_path, max_steps=40, save_strategy="no", learning_rate=3e-3)
    trainer.train()
    penalties = [line["penalty"] for line in read_history(tmp_path)]
    assert sum(penalties[-8:]) < 0.5 * sum(penalties[:8])


def test_metrics_history_and_manifest(tmp_path):
    trainer = surgery_trainer(tmp_path)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "surgery/penalty" in line]
    assert [line["step"] for line in logged] == [2, 4, 6]
    history = read_history(tmp_path)
    pair = history[2:4]
    assert logged[1]["surgery/penalty"] == pytest.approx(sum(line["penalty"] for line in pair) / 2, rel=1e-5)
    assert logged[1]["surgery/positive_heads"] == sum(line["positive_heads"] for line in pair) / 2
    keys = {"max_divergence", "sink_mass_harmful", "sink_mass_refusal", "time_share"}
    assert keys <= {key.removeprefix("surgery/") for key in logged[0]}
    assert 0 < logged[0]["surgery/time_share"] < 1
    d = torch.tensor(history[0]["divergence"])
    assert d.shape == (3, 4) and int((d > 0).sum()) == history[0]["positive_heads"]
    assert history[0]["penalty"] == pytest.approx(300 * d.clamp_min(0).mean().item(), rel=1e-4)
    manifest = json.loads((tmp_path / "surgery_manifest.json").read_text())
    assert manifest["versions"]["torch"] == metadata.version("torch")
    assert set(manifest["probe_data_sha256"]) == {"harmful", "refusal"}
    assert manifest["config"]["lambda_sink"] == 300.0
    for folder in (tmp_path, tmp_path / "checkpoint-6"):
        assert surgery.SurgeryConfig.load(folder) == trainer.surgery.config
    # the model is left as it came
    assert trainer.model.config._attn_implementation == "sdpa"


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = surgery_trainer(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "cut" / name)
    with open(tmp_path / "cut" / HISTORY, "a") as file:
        file.write('{"step": 7, "pen')
    resumed = surgery_trainer(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for name, weight in weights(whole.model).items():
        assert torch.equal(weight, weights(resumed.model)[name]), name
    assert read_history(tmp_path / "cut") == read_history(tmp_path / "whole")


@pytest.mark.parametrize("how", ("config", "data"))
def test_resume_with_another_config_or_data_is_refused(tmp_path, how):
    surgery_trainer(tmp_path, max_steps=2).train()
    config = surgery.SurgeryConfig(pairs_per_step=2, lambda_sink=100.0 if how == "config" else 300.0)
    harmful = HARMFUL if how == "config" else HARMFUL[:-1]
    trainer = surgery.SurgeryTrainer(**parts(tmp_path), surgery_config=config, harmful=harmful, refusal=REFUSAL)
    message = "lambda_sink was 300.0, is 100.0" if how == "config" else "another probe_data_sha256: harmful was"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


def test_resume_from_a_plain_checkpoint_is_refused(tmp_path):
    surgery_trainer(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / STATE).unlink()
    assert complete_checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match=f"resumes at step 2, but no {STATE}"):
        surgery_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_callback_on_any_trainer_needs_its_trainer(tmp_path):
    callback = surgery.SurgeryCallback(surgery.SurgeryConfig(pairs_per_step=1), HARMFUL, REFUSAL)
    trainer = Trainer(**parts(tmp_path, max_steps=1, save_strategy="no"), callbacks=[callback])
    with pytest.raises(ValueError, match="attach"):
        trainer.train()
    callback.attach(trainer)
    trainer.train()
    assert len(read_history(tmp_path)) == 1
    with pytest.raises(ValueError, match="probe data are needed"):
        surgery.SurgeryCallback(harmful=HARMFUL)


def test_data_parallel_and_missing_tokenizer(tmp_path, monkeypatch):
    trainer = surgery_trainer(tmp_path / "a", save_strategy="no")
    monkeypatch.setattr(type(trainer.args), "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"nn.DataParallel on 2 GPUs.*torchrun"):
        trainer.surgery.on_train_begin(trainer.args, trainer.state, trainer.control)
    monkeypatch.undo()
    options = {**parts(tmp_path / "b", save_strategy="no"), "processing_class": None}
    trainer = surgery.SurgeryTrainer(**options, harmful=HARMFUL, refusal=REFUSAL)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        trainer.train()


@pytest.mark.parametrize("name", ("cp_size", "sp_size"))
def test_context_parallel_training_is_refused(tmp_path, name):
    trainer = surgery_trainer(tmp_path, save_strategy="no")
    trainer.accelerator.state.parallelism_config = SimpleNamespace(**{name: 2})
    with pytest.raises(ValueError, match=f"{name} must be 1, got 2"):
        trainer.surgery.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.accelerator.state.parallelism_config = None


def test_attention_replaced_during_training_stops_the_run(tmp_path):
    class Replace(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.set_attn_implementation("sdpa")

    trainer = surgery_trainer(tmp_path, save_strategy="no")
    trainer.add_callback(Replace())
    with pytest.raises(ValueError, match="replaced after patch_model"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_bf16_autocast_and_compile(tmp_path):
    torch._dynamo.reset()
    trainer = surgery_trainer(
        tmp_path, bf16=True, torch_compile=True, torch_compile_backend="aot_eager", max_steps=2, save_strategy="no"
    )
    trainer.train()
    assert all(line["penalty"] > 0 for line in read_history(tmp_path))


@pytest.mark.parametrize("packing", (False, True), ids=("padded", "packed"))
def test_sft_trainer(tmp_path, packing):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in rows(12, seed=5)
    ]
    config = trl.SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        packing=packing,
        max_length=64,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = surgery.SurgerySFTTrainer(
        tiny_model(attention="sdpa"),
        args=config,
        train_dataset=datasets.Dataset.from_list(chats),
        processing_class=tiny_tokenizer(),
        surgery_config=surgery.SurgeryConfig(pairs_per_step=2),
        harmful=HARMFUL,
        refusal=REFUSAL,
    )
    trainer.train()
    assert sum("surgery/penalty" in line for line in trainer.state.log_history) == 2
