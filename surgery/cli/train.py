"""Fine-tune a chat model with the Surgery regulariser or another defence, full or LoRA.

Task rows are JSON lines with `prompt` and `response` (or `messages`); probe rows likewise. Every option can stand in
a YAML or JSON file (--config), regulariser options under `surgery:`; flags win. --lambda-sink 0 is plain fine-tuning
with the divergence measured, and so is every other --defence. A killed run goes on with --resume.

    surgery train --model demo --data gsm8k.jsonl --limit 300 --harmful harmful.jsonl --refusal refusals.jsonl \\
        --steps 60 --output runs/surgery
"""

import json
import logging
from pathlib import Path

from .flags import add_flags, picked, print_result, read_config_file, summary_table

# fields of SurgeryConfig whose name TrainConfig takes
RENAMED = {"max_length": "probe_max_length", "seed": "probe_seed"}


def add_arguments(parser):
    from ..config import SurgeryConfig
    from ..finetune import TrainConfig

    parser.add_argument("--config", help="YAML or JSON file of options")
    add_flags(parser.add_argument_group("training"), TrainConfig)
    add_flags(parser.add_argument_group("regulariser"), SurgeryConfig, RENAMED)


def configs(arguments):
    """(TrainConfig, SurgeryConfig) from --config and flags.

    Raises:
        ValueError: unknown or invalid options.
    """
    from ..config import SurgeryConfig
    from ..finetune import TrainConfig

    options = read_config_file(arguments.config) if arguments.config else {}
    surgery = options.pop("surgery", None) or {}
    if not isinstance(surgery, dict):
        raise ValueError(f"`surgery` in the config file must be a mapping, got {type(surgery).__name__}")
    surgery = {**surgery, **picked(arguments, SurgeryConfig)}
    train = TrainConfig.from_dict({**options, **picked(arguments, TrainConfig)})
    measured = {} if train.defence == "surgery" else {"lambda_sink": 0.0}
    return train, SurgeryConfig.from_preset(**{"preset": "paper", **measured, **surgery})


def run(arguments):
    from ..finetune import run_training

    train, surgery = configs(arguments)
    if surgery.preset == "upstream":
        logging.getLogger("surgery").warning(
            "preset upstream compares harmful with whatever --refusal holds, one pair a step; the released code used "
            "merely safe answers there, which leave hardly a head to act on: 4 of SmolLM2-135M-Instruct's 270 are "
            "positive at p < 0.05 instead of 24"
        )
    trainer = run_training(train, surgery, progress=not arguments.json)
    if not trainer.is_world_process_zero():
        return 0
    result = summary(trainer, train)
    Path(train.output, "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_result(result, arguments.json, summary_table(result))
    return 0


def summary(trainer, train):
    """First and last fifth of the run, from its history and Trainer's log."""
    from ..run_files import read_history

    history = read_history(train.output)
    fifth = max(1, len(history) // 5)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result = {"steps": trainer.state.global_step, "task_loss_first": losses[0], "task_loss_last": losses[-1]}
    for name, lines in (("first", history[:fifth]), ("last", history[-fifth:])):
        for key in ("penalty", "mean_relu_divergence", "positive_heads"):
            result[f"{key}_{name}_fifth"] = sum(line[key] for line in lines) / len(lines)
    return result
