"""One cell in a process of its own: train, evaluate, write result.json. `python -m bench.defence` starts it.

The folder of a cell holds answers and must stay out of the repository; result.json holds ids and numbers only.
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq

from surgery.config import SurgeryConfig
from surgery.data import RowEncoder, read_rows, task_examples
from surgery.evaluation import load_judge
from surgery.evaluation.evaluate import answer_sets, evaluate_tasks, judge_all, read_verdicts
from surgery.finetune import TrainConfig, run_training
from surgery.measure import measure
from surgery.models import load_model, pick_device
from surgery.run_costs import StepClock, peak_bytes
from surgery.run_files import read_history, write_json

from .grid import PAPER_LAMBDA, Cell, Recipe
from .splits import prompt_sets, shuffled

RESULT, RUN = "result.json", "run"


def run_cell(cell, recipe, paths):
    """Train and evaluate one cell; writes paths["folder"]/result.json.

    Args:
        cell: Cell. recipe: Recipe.
        paths: dict: folder of the cell, parts (see splits.py), data, and the models of both starts, chat and aligned.
    """
    folder = Path(paths["folder"])
    # an earlier try that was cut off; answers go on from where they stopped
    shutil.rmtree(folder / RUN, ignore_errors=True)
    result = {"key": cell.key, **cell.to_dict(), "method": cell.method}
    start = paths[cell.start]
    if cell.defence == "none":
        model, tokenizer = load_model(start)
        model.to(pick_device())
    else:
        model, tokenizer, measured = _train(cell, recipe, paths, start)
        result |= measured
    result |= evaluate(model, tokenizer, recipe, paths, folder)
    write_json(folder / RESULT, result)
    shutil.rmtree(folder / RUN, ignore_errors=True)


def configs(cell, recipe, paths, start):
    """(TrainConfig, SurgeryConfig) of a cell; the divergence is measured in every defence."""
    parts = shuffled(paths["parts"], cell.seed)
    surgery = dict(cell.surgery)
    preset = surgery.pop("preset", "paper")
    # the released code compares with merely safe answers
    reference = "probe_safe" if preset == "upstream" else "probe_refusal"
    train = TrainConfig(
        model=start,
        data=str(parts / "task.jsonl"),
        limit=recipe.rows,
        mix=str(parts / "poison.jsonl") if cell.poison else None,
        mix_ratio=cell.poison,
        harmful=str(parts / "probe_harmful.jsonl"),
        refusal=str(parts / f"{reference}.jsonl"),
        output=str(Path(paths["folder"], RUN)),
        steps=recipe.steps,
        log_every=1,
        save_every=10**6,
        run_seed=cell.seed,
        defence=cell.defence,
        **{
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "max_length": recipe.max_length,
            **cell.train,
        },
    )
    options = {"max_length": recipe.probe_length, "seed": 43 + cell.seed}
    if preset == "paper":
        options["pairs_per_step"] = recipe.pairs
    options["lambda_sink"] = PAPER_LAMBDA if cell.defence == "surgery" else 0.0
    return train, SurgeryConfig.from_preset(preset, **{**options, **surgery})


def _train(cell, recipe, paths, start):
    """(model, tokenizer, what the run itself says)."""
    clock = StepClock()
    trainer = run_training(*configs(cell, recipe, paths, start), progress=False, callbacks=[clock])
    log = trainer.state.log_history
    losses = [line["loss"] for line in log if "loss" in line]
    shares = [line["surgery/time_share"] for line in log if "surgery/time_share" in line]
    # where nothing is penalised, the probe only measures for this table: it is no cost of the method
    counted = [1 - (cell.defence != "surgery") * share for share in shares]
    history = read_history(trainer.args.output_dir)
    return (
        trainer.model,
        trainer.processing_class,
        {
            "step_seconds": statistics.median(s * c for s, c in zip(clock.seconds, counted, strict=True)),
            "peak_bytes": peak_bytes(),
            "changed_weights": changed_share(trainer.model, load_model(start, cell.train.get("weights", "float32"))[0]),
            "train_losses": [round(loss, 4) for loss in losses],
            "positive_heads_by_step": [line["positive_heads"] for line in history],
            "mean_relu_divergence_by_step": [round(line["mean_relu_divergence"], 7) for line in history],
        },
    )


def evaluate(model, tokenizer, recipe, paths, folder):
    """Losses on held-out rows, sink divergence, answers judged, task accuracy: JSON types, no text."""
    parts = Path(paths["parts"])
    found = {}
    encoder = RowEncoder(tokenizer, recipe.max_length)
    for name, part in (("task", "task_test"), ("harmful", "heldout_harmful"), ("refusal", "heldout_refusal")):
        rows = read_rows(parts / f"{part}.jsonl", recipe.losses)
        found[f"{name}_losses"] = row_losses(model, tokenizer, rows, encoder)
    heldout = [str(parts / f"heldout_{name}.jsonl") for name in ("harmful", "refusal")]
    with autocast():
        measured = measure(model, tokenizer, *heldout, SurgeryConfig(max_length=recipe.probe_length), recipe.losses)
    found["divergence"] = measured.summary()
    found |= _answers(model, tokenizer, recipe, paths, folder)
    return found


def _answers(model, tokenizer, recipe, paths, folder):
    model = model.to(torch.bfloat16)
    if pick_device().type == "cpu":
        # aten's flash attention for CPU spends its time on packing when there is one query row
        model.set_attn_implementation("eager")
    sets = prompt_sets(paths["data"], paths["parts"], recipe.prompt_stride)
    options = {"max_new_tokens": recipe.answer_tokens, "batch_size": 80}
    answers = answer_sets(model, tokenizer, sets, folder, "cell", **options)
    judge_all(sets, answers, [load_judge("string")], folder)
    task = {"gsm8k": str(Path(paths["parts"], "task_test.jsonl"))}
    options = {"limit": recipe.accuracy, "max_new_tokens": recipe.task_tokens, "batch_size": 48}
    evaluate_tasks(model, tokenizer, task, folder, **options)
    verdicts = read_verdicts(folder)
    found = {"prompts": {}, "refusal": {}, "incoherent": {}}
    for benchmark in sets:
        records = verdicts[benchmark, "string"]
        found["prompts"][benchmark] = [record["id"].rsplit("-", 1)[1] for record in records]
        for name in ("refusal", "incoherent"):
            found[name][benchmark] = bits(record[name] for record in records)
    found["correct"] = bits(record["correct"] for record in verdicts["gsm8k", "lm-eval"])
    return found


def bits(values):
    """ "0110" of booleans."""
    return "".join("1" if value else "0" for value in values)


def row_losses(model, tokenizer, rows, encoder, batch_size=12):
    """Mean loss a response token of each row, nats, rounded to 1e-4."""
    examples = task_examples(rows, encoder)
    # like lengths together; put back in order below
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    collate, device = DataCollatorForSeq2Seq(tokenizer), next(model.parameters()).device
    losses = [0.0] * len(examples)
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[i] for i in chosen]).to(device)
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad(), autocast():
            logits = model(**batch).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.float().mT, labels, reduction="none", ignore_index=-100)
        for i, loss in zip(chosen, each.sum(1) / (labels != -100).sum(1), strict=True):
            losses[i] = round(loss.item(), 4)
    return losses


@torch.no_grad()
def changed_share(model, start):
    """Share of the weights (single numbers) that are not what they were."""
    pairs = [(new, old.to(new.device)) for new, old in zip(model.parameters(), start.parameters(), strict=True)]
    return sum((new != old).sum().item() for new, old in pairs) / sum(new.numel() for new, _ in pairs)


def autocast():
    return torch.autocast(pick_device().type, torch.bfloat16)


def main(argv=None):
    cell, recipe, paths = json.loads((argv or sys.argv[1:])[0])
    run_cell(Cell(**cell), Recipe(**recipe), paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
