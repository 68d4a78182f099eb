"""Memory of a training step of three public models by fake tensors: plain fine-tuning, Surgery, the paper's way.

    python -m bench.estimate_table --csv bench/results/estimate.csv

bf16 weights and AdamW; a micro-batch of 4 x 1024 task tokens, and 4 probe pairs of 512 tokens. Prints the table of
what each method needs over plain fine-tuning, in GiB. Nothing is computed, and no GPU is needed or measured.
"""

import argparse
import csv
import sys

from surgery.estimate import METHODS, estimate_step

GIB = 2**30
MODELS = ("llama3.2-1b", "llama3-8b", "qwen2.5-7b")
SIZES = {"task_batch": 4, "task_length": 1024, "probe_pairs": 4, "probe_length": 512}
# gradients are resident in each: kept by accumulation, by an engine, or LoRA's few
SETTINGS = {
    "full, accumulation": {"gradients_resident": True},
    "full, accumulation, checkpointing": {"gradients_resident": True, "checkpointing": True},
    "LoRA 16": {"lora": 16},
    "LoRA 16, checkpointing": {"lora": 16, "checkpointing": True},
    "full, FSDP2 on 8, checkpointing": {"engine": "fsdp2", "ranks": 8, "checkpointing": True},
    "full, ZeRO-3 on 8, checkpointing": {"engine": "zero3", "ranks": 8, "checkpointing": True},
}
PARTS = ("parameters", "gradients", "optimizer", "activations", "engine", "total")


def rows(models, settings, sizes):
    """Yield (model, setting, {method: StepEstimate})."""
    for model in models:
        for name in settings:
            options = {**sizes, **SETTINGS[name]}
            yield model, name, {method: estimate_step(model, method=method, **options) for method in METHODS}


def main(argv=None):
    """Returns 0, or 1 when Surgery needs more than plain fine-tuning somewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names as in `surgery estimate`")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--csv", help="bytes of every part")
    options = parser.parse_args(argv)
    lines, status = [], 0
    print("| model | setting | plain, GiB | Surgery | the paper's way |\n| --- | --- | --- | --- | --- |")
    for model, setting, found in rows(options.models.split(","), options.settings, SIZES):
        plain = found["plain"].total
        over = {method: (one.total - plain) / GIB for method, one in found.items()}
        print(
            f"| {model} | {setting} | {plain / GIB:.3f} | {over['surgery']:+.3f} | {over['paper']:+.3f} |", flush=True
        )
        # a record of the probe's statistics is a few bytes a head
        status |= over["surgery"] >= 0.0005
        lines += [
            (model, setting, method, *(getattr(one, part) for part in PARTS), one.total - plain)
            for method, one in found.items()
        ]
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("model", "setting", "method", *(f"{part}_bytes" for part in PARTS), "over_plain_bytes"))
            writer.writerows(lines)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
