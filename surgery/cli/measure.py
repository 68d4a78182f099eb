"""Sink divergence of every head of a model: alpha(harmful) - alpha(refusal), with standard errors.

Writes measurement.json, divergence.csv (layer, head, divergence, standard_error), measurement.npz (alpha of every
sequence) and head_map.png into --output.

    surgery measure --model demo --harmful harmful.jsonl --refusal refusals.jsonl --output measured
"""

import csv
import json
from pathlib import Path

from .flags import add_flags, picked, print_result, summary_table


def add_arguments(parser):
    from ..config import SurgeryConfig

    parser.add_argument("--model", default="demo", help="folder, Hugging Face id, or demo")
    parser.add_argument("--harmful", required=True, help="JSON lines file or data set id of harmful rows")
    parser.add_argument("--refusal", required=True, help="the same of refusal rows")
    parser.add_argument("--output", help="folder for the results; without it they are only printed")
    parser.add_argument("--limit", type=int, help="rows of each side")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a forward (default: 8)")
    add_flags(parser.add_argument_group("regulariser"), SurgeryConfig)


def run(arguments):
    import numpy as np

    from ..config import SurgeryConfig
    from ..measure import measure
    from ..models import load_model, pick_device
    from ..plots import head_map

    config = SurgeryConfig.from_preset(
        **{"preset": "paper", **picked(arguments, SurgeryConfig)},
    )
    model, tokenizer = load_model(arguments.model)
    measured = measure(
        model.to(pick_device()),
        tokenizer,
        arguments.harmful,
        arguments.refusal,
        config,
        arguments.limit,
        arguments.batch_size,
        progress=not arguments.json,
    )
    summary = measured.summary()
    if arguments.output:
        folder = Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "measurement.json").write_text(
            json.dumps({"summary": summary, "config": config.to_dict()}, indent=2) + "\n", encoding="utf-8"
        )
        np.savez_compressed(folder / "measurement.npz", harmful=measured.harmful, refusal=measured.refusal)
        with open(folder / "divergence.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("layer", "head", "divergence", "standard_error"))
            for (layer, head), d in np.ndenumerate(measured.divergence):
                writer.writerow((layer, head, f"{d:.6g}", f"{measured.standard_error[layer, head]:.6g}"))
        head_map(measured.divergence, folder / "head_map.png")
    print_result(summary, arguments.json, summary_table(summary))
    return 0
