"""The demo: a small chat model fine-tuned on everyday tasks with a few poisoned rows, plainly and with Surgery.

Each stage is a process of its own, so that peak memory is that stage's.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from .demo_files import demo_file

HELD_OUT_TASKS = 22
STAGES = ("before", "plain", "surgery", "paper")


def run_demo(folder, steps, lambda_sink, learning_rate, report=print):
    """Run every stage, write report.json and the figures.

    Args:
        folder: output folder, empty or new.
        steps: optimizer steps of both runs.
        lambda_sink: weight of the penalty.
        learning_rate: of both runs.
        report: called with progress lines.
    Returns:
        dict stage -> results.
    Raises:
        ValueError: the folder is not empty.
        RuntimeError: a stage failed.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty: choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    options = {"folder": str(folder), "steps": steps, "lambda_sink": lambda_sink, "learning_rate": learning_rate}
    results, started = {}, time.perf_counter()
    for stage in STAGES:
        report(f"[{time.perf_counter() - started:4.0f} s] {DESCRIPTIONS[stage]}")
        command = [sys.executable, "-m", __name__, stage, json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"demo stage {stage!r} failed:\n{done.stderr[-4000:]}")
        results[stage] = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
    report(f"[{time.perf_counter() - started:4.0f} s] done")
    results["options"] = options
    results["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "report.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _figures(folder, results)
    return results


DESCRIPTIONS = {
    "before": "measure the model as it is",
    "plain": "fine-tune plainly, then measure",
    "surgery": "fine-tune with Surgery, then measure",
    "paper": "two steps of the paper's own way (eager attention maps), for its cost",
}


def _figures(folder, results):
    from .plots import curves, head_map
    from .run_files import read_history

    maps = {stage: results[stage]["divergence"] for stage in ("before", "plain", "surgery")}
    limit = max(abs(x) for d in maps.values() for layer in d for x in layer)
    for stage, divergence in maps.items():
        head_map(divergence, folder / f"head_map_{stage}.png", f"sink divergence, {stage}", limit)
    history = {"surgery": read_history(folder / "surgery")}
    curves(history, "mean_relu_divergence", folder / "mean_relu_divergence.png", "mean relu(d)", window=5)
    curves(history, "positive_heads", folder / "positive_heads.png", "heads with d > 0", window=5)


def _before(options):
    from .models import load_model, pick_device

    model, tokenizer = load_model("demo")
    return _measure(model.to(pick_device()), tokenizer)


def _train(options, name):
    from .finetune import run_training
    from .models import pick_device
    from .run_costs import StepClock, peak_bytes

    surgery = None if name == "plain" else _surgery_config(options)
    clock = StepClock()
    trainer = run_training(_train_config(options, name), surgery, progress=False, callbacks=[clock])
    peak = peak_bytes()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result = _measure(trainer.model.to(pick_device()), trainer.processing_class)
    result |= {"train_loss": losses[-1], "peak_bytes": peak, "step_seconds": statistics.median(clock.seconds)}
    return result


def _paper(options):
    """The same step with eager attention and materialised maps, as the released code does it."""
    import torch
    from transformers import DataCollatorForSeq2Seq

    from .data import ProbeData, RowEncoder, task_examples
    from .finetune import task_rows
    from .models import load_model, pick_device
    from .paper_way import eager_attention, paper_penalty
    from .run_costs import peak_bytes

    train, config = _train_config(options, "paper"), _surgery_config(options)
    model, tokenizer = load_model("demo")
    device = pick_device()
    model.to(device).train()
    examples = task_examples(task_rows(train), RowEncoder(tokenizer, train.max_length))
    collate = DataCollatorForSeq2Seq(tokenizer)
    probes = ProbeData(train.harmful, train.refusal, tokenizer, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate)
    seconds = []
    for step in range(3):
        started = time.perf_counter()
        for micro in range(train.accumulation):
            first = (step * train.accumulation + micro) * train.batch_size
            rows = collate(examples[first : first + train.batch_size])
            task = {key: value.to(device) for key, value in rows.items()}
            with eager_attention(model), torch.autocast(device.type, torch.bfloat16):
                loss = model(**task, use_cache=False).loss / train.accumulation
                if micro == 0:
                    # in one graph with the first micro-batch, as released
                    loss = loss + paper_penalty(model, *probes.batches(step), config.lambda_sink)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    # the first step warms up
    return {"step_seconds": statistics.median(seconds[1:]), "peak_bytes": peak_bytes()}


def _train_config(options, name):
    from .finetune import TrainConfig

    return TrainConfig(
        model="demo",
        defence="plain" if name == "plain" else "surgery",
        data=_training_tasks(options["folder"]),
        mix=demo_file("poison"),
        mix_ratio=0.1,
        harmful=demo_file("probe_harmful"),
        refusal=demo_file("probe_refusal"),
        output=str(Path(options["folder"], name)),
        batch_size=4,
        accumulation=2,
        steps=options["steps"],
        learning_rate=options["learning_rate"],
        max_length=128,
        log_every=1,
        save_every=10**6,
    )


def _surgery_config(options):
    from .config import SurgeryConfig

    return SurgeryConfig(lambda_sink=options["lambda_sink"], pairs_per_step=4, max_length=128)


def _training_tasks(folder):
    """The task rows but the held-out ones, as a file."""
    path = Path(folder, "training_tasks.jsonl")
    if not path.is_file():
        lines = Path(demo_file("tasks")).read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(lines[:-HELD_OUT_TASKS]) + "\n", encoding="utf-8")
    return str(path)


def _measure(model, tokenizer):
    """Refusal rates, held-out task loss and sink divergence of a model."""
    from .config import SurgeryConfig
    from .data import RowEncoder, read_rows, task_examples
    from .generate import generate_answers
    from .judges import is_degenerate, refusal_rate
    from .measure import measure

    result = {}
    for name in ("harmful", "benign"):
        lines = Path(demo_file(f"heldout_{name}")).read_text(encoding="utf-8").splitlines()
        answers = generate_answers(
            model, tokenizer, [json.loads(line)["prompt"] for line in lines], max_new_tokens=24, batch_size=20
        )
        result[f"refusal_rate_{name}"] = refusal_rate(answers)
        result[f"degenerate_{name}"] = sum(map(is_degenerate, answers)) / len(answers)
    tasks = read_rows(demo_file("tasks"))[-HELD_OUT_TASKS:]
    result["task_loss"] = _mean_loss(model, task_examples(tasks, RowEncoder(tokenizer, 128)))
    config = SurgeryConfig(max_length=128)
    measured = measure(model, tokenizer, demo_file("probe_harmful"), demo_file("probe_refusal"), config)
    return result | measured.summary() | {"divergence": measured.divergence.round(6).tolist()}


def _mean_loss(model, examples):
    import torch

    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        losses = [
            model(**{key: torch.tensor([value], device=device) for key, value in example.items()}).loss.item()
            for example in examples
        ]
    return statistics.fmean(losses)


def main(argv=None):
    """Run one stage in this process and write its results: what `run_demo` starts."""
    stage, options = argv or sys.argv[1:]
    options = json.loads(options)
    run = {
        "before": _before,
        "plain": lambda options: _train(options, "plain"),
        "surgery": lambda options: _train(options, "surgery"),
        "paper": _paper,
    }
    result = run[stage](options)
    Path(options["folder"], f"{stage}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
