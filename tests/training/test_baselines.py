"""The defences of surgery/baselines, each against its formula written out in loops, and in whole runs."""

import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import gradients, rows, tiny_model, tiny_tokenizer, worst_error
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

import surgery
from surgery.baselines import DEFENCES
from surgery.baselines.constrained import (
    ConstrainedMixin,
    ReferenceCollator,
    aligned_logps,
    constrained_loss,
    parse_betas,
)
from surgery.baselines.lisa import SWITCH, LisaMixin
from surgery.cli.main import main
from surgery.data import RowEncoder, task_examples
from surgery.finetune import TrainConfig, run_training
from surgery.run_files import STATE, UNMEASURED, complete_checkpoints, read_history

MEASURE = surgery.SurgeryConfig(lambda_sink=0.0, pairs_per_step=2)
ROWS = {"data": rows(24, 5), "harmful": rows(9, 10, response_words=8), "refusal": rows(11, 11, response_words=4)}
# so that every defence does all it does within a few steps
SHORT = {
    "refusal_mixing": {"mixing_ratio": 0.25},
    "lisa": {"lisa_alignment_steps": 2, "lisa_task_steps": 4, "lisa_rho": 30.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and data files."""
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


# refusal mixing


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


# Lisa


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


@pytest.mark.parametrize("trained", ("full", "lora"))
def test_lisa_equals_a_written_out_loop(tmp_path, trained):
    """States of 2 and 3 steps, two micro-batches a step, clipping, AdamW: losses and weights of 7 steps in float64."""

    def fresh():
        model = tiny_model(attention="eager", dtype=torch.float64)
        # transformers' own takes float32
        model.loss_function = float64_loss
        return adapted(model) if trained == "lora" else model

    task, alignment = examples_of(ROWS["data"]), examples_of(ROWS["refusal"])
    collator, rho = DataCollatorForSeq2Seq(tiny_tokenizer()), 0.7
    options = {"train_dataset": task, "data_collator": collator}
    plain = Recorder(fresh(), arguments(tmp_path / "plain"), **options)
    plain.train()
    lisa = type("LisaTrainer", (LisaMixin, Trainer), {})
    trainer = lisa(
        fresh(), arguments(tmp_path / "lisa"), **options, alignment=alignment, alignment_steps=2, task_steps=3, rho=rho
    )
    trainer.train()

    model = fresh()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    order = []
    for epoch in range(3):
        rank = list(range(len(alignment)))
        random.Random(f"42-lisa-{epoch}").shuffle(rank)
        order += rank
    expected = []
    for step, aligning in enumerate((True, True, False, False, False, True, True)):
        if step in (0, 2, 5):
            switch = [p.detach().clone() for p in parameters]
        micros = (2 * step, 2 * step + 1)
        if aligning:
            means = []
            for micro in micros:
                total, count = summed_loss(model, collator([alignment[i] for i in order[2 * micro : 2 * micro + 2]]))
                means.append(total / count)
            loss = sum(means) / 2
        else:
            # Trainer counts tokens over the whole step
            parts = [summed_loss(model, plain.seen[micro]) for micro in micros]
            loss = sum(total for total, _ in parts) / sum(count for _, count in parts)
        loss = loss + rho / 2 * sum((p - w).square().sum() for p, w in zip(parameters, switch, strict=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        expected.append(loss.item())
    # transformers 4 logs four decimals
    assert losses(trainer) == pytest.approx(expected, rel=1e-5, abs=5.1e-5)
    found = weights(trainer)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            found[name], p.detach(), rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    # the weights have moved by far more than that
    assert max((p - w).abs().max() for p, w in zip(parameters, switch, strict=True)) > 1e-3


def test_lisa_saves_the_weights_at_the_switch(folder, tmp_path):
    trainer = train(folder, tmp_path, "lisa", MEASURE)
    first = load_file(folder / "model" / "model.safetensors")
    saved = {step: load_file(tmp_path / f"checkpoint-{step}" / SWITCH) for step in (2, 4, 6)}
    after = {step: load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4)}
    assert saved[2].keys() == {name for name, _ in trainer.model.named_parameters()}
    for name in saved[2]:
        # checkpoint 2 lies at the end of the alignment state that began with the first weights
        assert torch.equal(saved[2][name], first[name])
        assert torch.equal(saved[4][name], after[2][name]) and torch.equal(saved[6][name], after[2][name])
    assert any(not torch.equal(after[2][name], after[4][name]) for name in saved[2])


def test_lisa_holds_the_weights_near_the_switch(folder, tmp_path):
    def moved(rho):
        trainer = train(folder, tmp_path / str(rho), "lisa", lisa_rho=rho, save_every=100)
        return sum((p - trainer._switch[name]).square().sum() for name, p in weights(trainer).items()).item()

    assert moved(1000.0) < 0.5 * moved(0.0)


def test_lisa_without_its_switch_does_not_resume(folder, tmp_path):
    train(folder, tmp_path / "run", "lisa")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "checkpoint-4" / SWITCH).unlink()
    with pytest.raises(
        ValueError, match=f"resumes at step 4 inside a state of lisa, but .*checkpoint-4/{SWITCH} is missing"
    ):
        train(folder, tmp_path / "run", "lisa", resume=True)


def test_lisa_knows_the_steps_of_an_epoch(folder, tmp_path):
    with pytest.raises(ValueError, match="a run of 6 steps would never see the task"):
        train(folder, tmp_path, "lisa", steps=None, lisa_alignment_steps=6)


# constrained fine-tuning


def written_out(logits, labels, reference, betas):
    """Eq. 3 token by token, float64."""
    total, count = 0.0, 0
    for b in range(labels.shape[0]):
        t = 0
        for i in range(1, labels.shape[1]):
            if labels[b, i] == -100:
                continue
            beta = betas[min(t, len(betas) - 1)]
            logp = logits[b, i - 1].double().log_softmax(-1)[labels[b, i]]
            total = total - 2 / beta * torch.sigmoid(beta * (logp - reference[b, i])).log()
            t, count = t + 1, count + 1
    return total / count


@pytest.mark.parametrize("side", ("left", "right"))
def test_constrained_loss_and_gradient_are_the_formulas(side):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 12, 17, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 17, (3, 12), generator=generator)
    # prompts and padding; the third row is plain text whose first token has no prediction
    labels[0, :7], labels[1, :3] = -100, -100
    if side == "left":
        labels[2, :2] = -100
    else:
        labels[0, 9:], labels[2, 10:] = -100, -100
    reference = -4 * torch.rand(3, 12, generator=generator)
    betas = (0.5, 2.0, 1.0, 0.1)
    found, expected = [], []
    for function, x, b in ((constrained_loss, logits.float(), torch.tensor(betas)), (written_out, logits, betas)):
        x.requires_grad_()
        loss = function(x, labels, reference, b)
        loss.backward()
        (found if function is constrained_loss else expected).extend((loss.detach().double(), x.grad.double()))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


def collated(tokenizer, examples, references):
    together = [{**one, "reference_logps": two} for one, two in zip(examples, references, strict=True)]
    return ReferenceCollator(DataCollatorForSeq2Seq(tokenizer))(together)


@pytest.mark.parametrize("side", ("left", "right"))
def test_constrained_gradient_is_cross_entropys_at_the_aligned_weights(side):
    tokenizer, model, examples = tiny_tokenizer(), tiny_model(attention="sdpa"), examples_of(ROWS["data"][:5])
    tokenizer.padding_side = side
    # in batches of two, used in one of five: the padding differs
    references = aligned_logps(model, examples, DataCollatorForSeq2Seq(tokenizer), 2, autocast=False)
    assert model.training
    batch = collated(tokenizer, examples, references)
    labels, reference = batch.pop("labels"), batch.pop("reference_logps")
    for row, one in zip(references, examples, strict=True):
        logits = model(torch.tensor([one["input_ids"]])).logits[0].detach()
        direct = [logits[i - 1].log_softmax(-1)[x].item() for i, x in enumerate(one["labels"]) if x != -100]
        assert row == pytest.approx(direct, abs=1e-5)
    truth = model(**batch, labels=labels)
    truth.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    betas = torch.tensor([0.5, 2.0, 0.1])
    loss = constrained_loss(model(**batch).logits, labels, reference, betas)
    loss.backward()
    assert worst_error(gradients(model), expected) <= 1e-4
    tokens = [2 / betas[min(t, 2)].item() * math.log(2) for row in references for t in range(len(row))]
    assert loss.item() == pytest.approx(sum(tokens) / len(tokens), rel=1e-4)


def test_constrained_leaves_a_token_alone_that_has_become_likelier():
    logits = torch.randn(1, 4, 17, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[-100, 3, 4, 5]])
    logps = torch.stack([logits[0, i].log_softmax(-1)[labels[0, i + 1]] for i in range(3)]).detach()
    # the second token's likelihood has grown by e^5
    reference = torch.cat([torch.zeros(1), logps - torch.tensor([0.0, 5.0, 0.0])])[None]
    (truth,) = torch.autograd.grad(cross_entropy(logits[0, :3], labels[0, 1:]), logits)
    for beta, share in ((2.0, 2 / (1 + math.exp(10))), (0.1, 2 / (1 + math.exp(0.5)))):
        (found,) = torch.autograd.grad(constrained_loss(logits, labels, reference, torch.tensor([beta])), logits)
        scale = torch.tensor([1.0, share, 1.0, 0.0], dtype=torch.float64)
        torch.testing.assert_close(found[0], truth[0] * scale[:, None], rtol=1e-5, atol=1e-7)


def test_constrained_loss_of_no_token_is_zero():
    logits = torch.randn(1, 3, 17, requires_grad=True)
    loss = constrained_loss(logits, torch.tensor([[4, -100, -100]]), torch.zeros(1, 3), torch.tensor([2.0]))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("trained", ("full", "lora"))
def test_constrained_trainer_divides_by_the_accumulation(tmp_path, trained):
    """Gradient of each step: the mean of two micro-batches' written-out losses, at the weights of that step."""
    model = tiny_model(attention="sdpa")
    collator = DataCollatorForSeq2Seq(tiny_tokenizer())
    examples = examples_of(ROWS["data"])
    references = aligned_logps(model, examples, collator, 4, autocast=False)
    if trained == "lora":
        model = adapted(model).float()
    betas, keep = (0.5, 2.0, 0.1), KeepGradients()
    trainer = type("ConstrainedTrainer", (ConstrainedMixin, Trainer), {})(
        model,
        arguments(tmp_path, max_steps=3, max_grad_norm=0.0),
        train_dataset=[{**one, "reference_logps": two} for one, two in zip(examples, references, strict=True)],
        data_collator=ReferenceCollator(collator),
        betas=betas,
        callbacks=[keep],
    )
    seen, loss_of = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: seen.append(dict(inputs)) or loss_of(model, inputs, **kwargs)
    trainer.train()
    assert len(seen) == 6 and len(keep.steps) == 3
    for step, found in enumerate(keep.steps):
        model.load_state_dict(keep.weights[step], strict=False)
        model.zero_grad()
        total = 0
        for batch in seen[2 * step : 2 * step + 2]:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            total = total + written_out(logits, batch["labels"], batch["reference_logps"], betas) / 2
        total.backward()
        assert worst_error(found, gradients(model)) <= 1e-4
        assert losses(trainer)[step] == pytest.approx(total.item(), rel=1e-4)


def test_constrained_reference_is_the_untouched_model_under_the_same_autocast(folder, tmp_path):
    """Adapters, checkpointing and bf16: the first loss is that of a margin of 0."""
    trainer = train(
        *(folder, tmp_path, "constrained", MEASURE),
        **{"bf16": True, "method": "lora", "gradient_checkpointing": True, "steps": 1, "accumulation": 1},
        **{"batch_size": 24, "constrained_betas": "2"},
    )
    assert losses(trainer) == pytest.approx([math.log(2)], rel=2e-3)
    exact = aligned_logps(
        tiny_model(attention="sdpa"), examples_of(ROWS["data"]), trainer.data_collator.collator, 24, False
    )
    kept = [one["reference_logps"] for one in trainer.train_dataset]
    assert max(abs(a - b) for x, y in zip(exact, kept, strict=True) for a, b in zip(x, y, strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("betas", "parsed"),
    (("0.5,2,0.1", (0.5, 2.0, 0.1)), ([1, 2], (1.0, 2.0)), ((3,), (3.0,)), ("0.5, 2", (0.5, 2.0))),
)
def test_betas(betas, parsed):
    assert parse_betas(betas) == parsed


@pytest.mark.parametrize("betas", ("", "0.5,0", "-1", "a,b", "nan", "inf", (), None, 2.0))
def test_wrong_betas(betas):
    with pytest.raises(ValueError, match="constrained_betas must be numbers > 0"):
        parse_betas(betas)


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


# whole runs


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
