"""Command-line flags made from the fields of the option dataclasses: one source of defaults and help texts."""

import argparse
import json
import sys
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path


def add_flags(parser, config_class, rename=None):
    """Add `--name` for every field of a dataclass; flags not given stay out of the namespace.

    Args:
        parser: argparse parser or group.
        config_class: dataclass whose fields carry metadata `help` and optionally `choices`.
        rename: field name -> flag name without dashes in front, where the field's own is taken.
    """
    rename = rename or {}
    hints = typing.get_type_hints(config_class)
    for option in fields(config_class):
        flag, help_text = "--" + rename.get(option.name, option.name).replace("_", "-"), option.metadata.get("help", "")
        if option.default is not MISSING and option.default is not None:
            help_text += f" (default: {option.default})"
        # argparse expands % in help texts
        settings = {"help": help_text.replace("%", "%%"), "default": argparse.SUPPRESS}
        settings["dest"] = _destination(config_class, option.name)
        kind = _plain_type(hints[option.name])
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        else:
            parser.add_argument(flag, type=kind, choices=option.metadata.get("choices"), metavar=None, **settings)


def _plain_type(hint):
    """int, float, bool or str out of a hint such as `int | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    options = [option for option in options if option is not type(None)]
    return options[0] if len(options) == 1 and options[0] in (int, float, bool) else str


def _destination(config_class, name):
    # two classes may have fields of one name
    return f"{config_class.__name__}.{name}"


def picked(namespace, config_class):
    """The flags of `config_class` that were given, as a dict."""
    given = vars(namespace)
    destinations = {option.name: _destination(config_class, option.name) for option in fields(config_class)}
    return {name: given[destination] for name, destination in destinations.items() if destination in given}


def read_config_file(path):
    """Options from a YAML or JSON file.

    Returns:
        dict; its `surgery` entry holds SurgeryConfig options.
    Raises:
        ValueError: no such file, or it holds something else than a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        options = json.loads(text)
    else:
        import yaml

        options = yaml.safe_load(text)
    if not isinstance(options, dict):
        raise ValueError(f"{path.name}: a config file must hold a mapping of options, got {type(options).__name__}")
    return options


def print_result(result, as_json, table):
    """Print a command's result: one JSON object with --json, else the readable `table` text."""
    if as_json:
        json.dump(result, sys.stdout, indent=2, default=float)
        print()
    else:
        print(table)


def summary_table(result):
    """Two-column text of a flat dict."""
    return text_table(
        ("quantity", "value"), [(k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in result.items()]
    )


def text_table(header, rows):
    """Aligned text of a header and rows of cells."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
