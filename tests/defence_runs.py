"""What the tests of surgery/baselines share: short runs on a tiny model, and a training loop's parts in float64."""

import json

import pytest
import torch
from tiny import gradients, rows, tiny_model, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

import surgery
from surgery.data import RowEncoder, task_examples
from surgery.finetune import TrainConfig, run_training

MEASURE = surgery.SurgeryConfig(lambda_sink=0.0, pairs_per_step=2)
ROWS = {"data": rows(24, 5), "harmful": rows(9, 10, response_words=8), "refusal": rows(11, 11, response_words=4)}
# so that every defence does all it does within a few steps
SHORT = {
    "refusal_mixing": {"mixing_ratio": 0.25},
    "lisa": {"lisa_alignment_steps": 2, "lisa_task_steps": 4, "lisa_rho": 30.0},
}


@pytest.fixture(scope="module", name="folder")
def model_and_data(tmp_path_factory):
    """A folder with a model and data files."""
    folder = tmp_path_factory.mktemp("baselines")
    tiny_model(attention="sdpa").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, some in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder


def train_config(folder, output, defence="plain", **overrides):
    options = {
        "model": str(folder / "model"),
        **{name: str(folder / f"{name}.jsonl") for name in ROWS},
        "output": str(output),
        "defence": defence,
        "steps": 6,
        "batch_size": 2,
        "accumulation": 2,
        "learning_rate": 1e-3,
        "max_length": 32,
        "bf16": False,
        "log_every": 1,
        "save_every": 2,
        "save_limit": 9,
    }
    return TrainConfig(**{**options, **SHORT.get(defence, {}), **overrides})


def train(folder, output, defence="plain", measure=None, callbacks=(), **overrides):
    return run_training(
        train_config(folder, output, defence, **overrides), measure, progress=False, callbacks=callbacks
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same_weights(a, b):
    return all(torch.equal(weights(a)[name], p) for name, p in weights(b).items())


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def arguments(folder, **overrides):
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 7,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(str(folder), **{**options, **overrides})


def examples_of(some):
    return task_examples(some, RowEncoder(tiny_tokenizer(), 32))


class Recorder(Trainer):
    """Keeps the inputs of every micro-batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(dict(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)


class KeepGradients(TrainerCallback):
    """Weights before and gradients of every step."""

    def __init__(self):
        self.weights, self.steps = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).double()


def float64_loss(logits, labels, num_items_in_batch=None, **kwargs):
    """What transformers computes for causal models, in the dtype of the logits."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return losses / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def summed_loss(model, batch):
    """(sum of the cross entropy of the labels, their number), token by token."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, count = 0.0, 0
    for b, t in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        total = total - logits[b, t].log_softmax(-1)[batch["labels"][b, t + 1]]
        count += 1
    return total, count
