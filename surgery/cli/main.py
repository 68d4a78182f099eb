"""`surgery COMMAND`: argument parsing and error policy. Each command is a module with `add_arguments` and `run`."""

import argparse
import logging
import os
import sys
from importlib import import_module

COMMANDS = {
    "demo": "fine-tune a small chat model with and without the regulariser and compare",
    "train": "fine-tune a chat model with the regulariser",
    "measure": "sink divergence of every head of a model on two sets of texts",
    "eval": "safety of a model's answers by the field's judges, over-refusal, and task accuracy",
    "plot": "figures of runs and measurements",
    "verify": "compare the regulariser's gradients with eager autograd on your model and settings",
    "estimate": "memory of a run before it starts",
    "env": "versions, devices and which kernel backend would run",
}


def build_parser():
    parser = argparse.ArgumentParser(
        prog="surgery",
        description="Fine-tuning that keeps a model's safety: the Surgery regulariser (arXiv 2602.05228) on flash "
        "attention. `surgery COMMAND --help` explains a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = import_module(f".{name}", __package__)
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv=None):
    """Run a command. Returns the exit status: 0, 1 when a check failed, 2 on wrong input."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "transformers", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except ValueError as error:
        print(f"surgery {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
