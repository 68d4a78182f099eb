"""Lisa (surgery/baselines/lisa.py) against its loop written out, and in whole runs."""

import random
import shutil

import pytest
import torch
from defence_runs import (
    MEASURE,
    ROWS,
    Recorder,
    adapted,
    arguments,
    examples_of,
    float64_loss,
    losses,
    model_and_data,  # noqa: F401
    summed_loss,
    train,
    weights,
)
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers import DataCollatorForSeq2Seq, Trainer

from surgery.baselines.lisa import SWITCH, LisaMixin


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
