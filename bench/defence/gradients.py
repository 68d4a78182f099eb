"""How noisy is the penalty's gradient, and how large beside the task's? Before any training, on the experiment's data.

    python -m bench.defence.gradients --output RUNS --csv results/cpu/defence/gradients.csv

For each number of probe pairs: the mean norm of the penalty's gradient over disjoint draws, the mean cosine between two
draws (1: every step pulls the same way; 0: noise), and the cosine with the gradient of many other pairs.
"""

import argparse
import csv
import itertools
import statistics
import sys
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq

import surgery
from surgery.data import ProbeData, RowEncoder, read_rows, task_examples
from surgery.models import load_model, pick_device

from .cell import autocast
from .grid import PAPER_LAMBDA, RECIPES

COLUMNS = ("what", "pairs", "draws", "norm", "cosine_of_draws", "cosine_with_many", "penalty")
# pairs of the gradient that the others are compared with, out of the rows that no draw takes
MANY = 64


def main(argv=None):
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    it.add_argument("--output", required=True, help="folder of runs of bench.defence, with its parts and start")
    it.add_argument("--csv", required=True)
    it.add_argument("--pairs", default="1,2,4,8,16", help="(default: 1,2,4,8,16)")
    it.add_argument("--draws", type=int, default=4, help="of each (default: 4)")
    arguments = it.parse_args(argv)
    pairs = [int(part) for part in arguments.pairs.split(",")]
    rows = gradient_rows(Path(arguments.output), RECIPES["cpu"], pairs, arguments.draws)
    with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return 0


def gradient_rows(output, recipe, pairs, draws, many=MANY):
    """Rows of the CSV: the task first, then each number of pairs.

    Args:
        output: folder with aligned/model and parts/.
        recipe: Recipe.
        pairs: numbers of pairs; draws: disjoint draws of each, at least 2.
        many: pairs of the gradient all are compared with.
    Raises:
        ValueError: the probe files have too few rows for disjoint draws.
    """
    model, tokenizer = load_model(output / "aligned" / "model")
    model.to(pick_device())
    parts = output / "parts"
    probes = {side: read_rows(parts / f"probe_{side}.jsonl") for side in ("harmful", "refusal")}
    need, have = many + max(pairs) * draws, min(map(len, probes.values()))
    if have < need:
        raise ValueError(f"disjoint draws need {need} probe rows of each side, got {have}")
    examples = task_examples(
        read_rows(parts / "task.jsonl", 2 * recipe.batch_size), RowEncoder(tokenizer, recipe.max_length)
    )
    collate = DataCollatorForSeq2Seq(tokenizer)
    surgery.patch_model(model)

    def penalty(start, count):
        rows = [found[start : start + count] for found in probes.values()]
        # one draw is one step of all its rows; chunks keep its memory small
        config = surgery.SurgeryConfig(
            lambda_sink=PAPER_LAMBDA, pairs_per_step=count, max_length=recipe.probe_length, probe_chunk_size=16
        )
        batches = ProbeData(*rows, tokenizer, config).batches(0)
        regularizer = surgery.SurgeryRegularizer(model, config)
        value = regularizer.backward(*(to_device(batch) for batch in batches), context=autocast)
        return float(value), take_gradient(model)

    _, reference = penalty(0, many)
    yield _task_row(model, examples, collate, recipe.batch_size, reference)
    for count in pairs:
        found = [penalty(many + i * count, count) for i in range(draws)]
        gradients = [gradient for _, gradient in found]
        yield {
            "what": "penalty",
            "pairs": count,
            "draws": draws,
            "norm": statistics.fmean(gradient.norm().item() for gradient in gradients),
            "cosine_of_draws": statistics.fmean(cosine(a, b) for a, b in itertools.combinations(gradients, 2)),
            "cosine_with_many": statistics.fmean(cosine(gradient, reference) for gradient in gradients),
            "penalty": statistics.fmean(value for value, _ in found),
        }


def _task_row(model, examples, collate, batch_size, reference):
    gradients = []
    for start in (0, batch_size):
        with autocast():
            loss = model(**to_device(collate(examples[start : start + batch_size]))).loss
        loss.backward()
        gradients.append(take_gradient(model))
    return {
        "what": "task",
        "draws": len(gradients),
        "norm": statistics.fmean(gradient.norm().item() for gradient in gradients),
        "cosine_of_draws": cosine(*gradients),
        "cosine_with_many": statistics.fmean(cosine(gradient, reference) for gradient in gradients),
    }


def to_device(batch):
    return {name: x.to(pick_device()) for name, x in batch.items()}


def take_gradient(model):
    """All gradients in one vector on the CPU; the model's are cleared."""
    found = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def cosine(a, b):
    return torch.cosine_similarity(a, b, 0).item()


if __name__ == "__main__":
    sys.exit(main())
