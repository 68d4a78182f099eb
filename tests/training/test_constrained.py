"""Constrained fine-tuning (surgery/baselines/constrained.py) against its formula, and in whole runs."""

import math

import pytest
import torch
from defence_runs import (
    MEASURE,
    ROWS,
    KeepGradients,
    adapted,
    arguments,
    examples_of,
    losses,
    model_and_data,  # noqa: F401
    train,
)
from tiny import gradients, tiny_model, tiny_tokenizer, worst_error
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, Trainer

from surgery.baselines.constrained import (
    ConstrainedMixin,
    ReferenceCollator,
    aligned_logps,
    constrained_loss,
    parse_betas,
)


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
