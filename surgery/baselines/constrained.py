"""Constrained fine-tuning (Qi et al. 2024, arXiv 2406.05946, eq. 3): the first response tokens stay near the aligned.

    loss = mean over response tokens of  -2 / beta_t * log sigmoid(beta_t * (log pi(y_t) - log pi_aligned(y_t)))

t counts response tokens from 1. The gradient is cross entropy's times 2 sigmoid(-beta_t * (log pi - log pi_aligned)):
cross entropy's own at the aligned weights, and nothing for a token that has become much likelier, the sooner the
larger beta_t. log pi_aligned is computed once, before training, so that no second model is kept.
"""

import math

import torch
import torch.nn.functional as F

from ..models import pick_device
from .defence import Defence


def parse_betas(betas):
    """Tuple of floats out of "0.5,2,0.1", a list or a tuple; the last holds for all later tokens.

    Raises:
        ValueError: none, not numbers, or not all > 0.
    """
    parts = betas.split(",") if isinstance(betas, str) else betas
    try:
        parsed = tuple(float(beta) for beta in parts)
    except (TypeError, ValueError):
        parsed = ()
    if not parsed or not all(0 < beta < math.inf for beta in parsed):
        raise ValueError(f"constrained_betas must be numbers > 0 like 0.5,2,2,2,2,0.1, got {betas!r}")
    return parsed


def token_logps(logits, labels):
    """log pi of each next label.

    Args:
        logits: [B, T, V].
        labels: [B, T], -100 where nothing is predicted.
    Returns:
        [B, T - 1] fp32, 0 where the next label is -100.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.view(targets.shape)


def constrained_loss(logits, labels, reference, betas):
    """Mean constrained loss of the response tokens, see the module's docstring.

    Args:
        logits: [B, T, V].
        labels: [B, T], -100 where nothing is predicted.
        reference: [B, T] fp32, log pi_aligned of each label; read where the label is one.
        betas: [n] fp32.
    Returns:
        scalar fp32, 0 without a predicted token.
    """
    predicted = labels[:, 1:] != -100
    number = (predicted.cumsum(1) - 1).clamp(0, len(betas) - 1)
    beta = betas[number]
    margin = beta * (token_logps(logits, labels) - reference[:, 1:])
    losses = -2 / beta * F.logsigmoid(margin)
    return (losses * predicted).sum() / predicted.sum().clamp(min=1)


@torch.no_grad()
def aligned_logps(model, examples, collator, batch_size, autocast):
    """log pi of each example's labels under `model`, where it stands.

    Args:
        model: the aligned model.
        examples: see `data.task_examples`.
        collator: DataCollatorForSeq2Seq.
        batch_size: sequences of a forward.
        autocast: under bf16 autocast, as in training.
    Returns:
        list of lists of floats, one for each label that is not -100; 0 for a sequence's first token.
    """
    was_training, found = model.training, []
    model.eval()
    device = next(model.parameters()).device
    for first in range(0, len(examples), batch_size):
        batch = {name: x.to(device) for name, x in collator(examples[first : first + batch_size]).items()}
        labels = batch.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(**batch, use_cache=False).logits
        logps = F.pad(token_logps(logits, labels), (1, 0))
        found += [row[kept].tolist() for row, kept in zip(logps.cpu(), (labels != -100).cpu(), strict=True)]
    model.train(was_training)
    return found


class ReferenceCollator:
    """Adds `reference_logps` [B, T], 0 where the label is -100, to the batches of `collator`."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, features):
        rows = [{key: value for key, value in one.items() if key != "reference_logps"} for one in features]
        batch = self.collator(rows)
        reference = torch.zeros(batch["labels"].shape)
        # row by row in both, on whichever side the padding is
        reference[batch["labels"] != -100] = torch.tensor([x for one in features for x in one["reference_logps"]])
        batch["reference_logps"] = reference
        return batch


class ConstrainedMixin:
    """The constrained loss on a Trainer class, whose batches hold `reference_logps`.

    Args:
        betas: floats > 0.
    Raises:
        ValueError: FSDP or DeepSpeed.
    """

    def __init__(self, *args, betas, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("the constrained loss needs a whole model and float32 inputs: no FSDP, no DeepSpeed")
        # the loss is a micro-batch's mean: Trainer divides by the accumulation
        self.model_accepts_loss_kwargs = False
        self.betas = torch.tensor(betas, device=self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels, reference = inputs.pop("labels"), inputs.pop("reference_logps")
        outputs = model(**inputs)
        loss = constrained_loss(outputs.logits, labels, reference, self.betas)
        return (loss, outputs) if return_outputs else loss


def check(train):
    """Parse the betas. Raises ValueError for what `parse_betas` refuses and for sharded weights."""
    train.constrained_betas = parse_betas(train.constrained_betas)
    if train.fsdp or train.deepspeed:
        raise ValueError("defence constrained reads the untouched model first, whole: no fsdp, no deepspeed")


def trainer_options(train, model, encoder, examples, collator):
    """See `defence.plain_options`."""
    model.to(pick_device())
    references = aligned_logps(model, examples, collator, train.batch_size, train.bf16)
    return {
        "train_dataset": [
            {**example, "reference_logps": logps} for example, logps in zip(examples, references, strict=True)
        ],
        "data_collator": ReferenceCollator(collator),
        "betas": train.constrained_betas,
    }


CONSTRAINED = Defence(
    options=("constrained_betas",),
    # Trainer would take reference_logps away, which no model knows
    arguments={"remove_unused_columns": False},
    mixins=(ConstrainedMixin,),
    check=check,
    trainer_options=trainer_options,
)
