"""Results on disk, and from them the table: means over seeds and prompts, with intervals and paired differences."""

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from .grid import Cell

CELLS = "cells.jsonl"
RESAMPLES = 4000
# name -> how it is read from a cell: [n] values, one a prompt or row
QUANTITIES = {
    "refusal": lambda cell: _bits(cell["refusal"]["strongreject"]),
    "safe_and_coherent": lambda cell: _safe_and_coherent(cell),
    "over_refusal": lambda cell: _bits(cell["refusal"]["xstest"]),
    "incoherent": lambda cell: _bits(cell["incoherent"]["strongreject"]),
    "task_loss": lambda cell: np.array(cell["task_losses"]),
    "task_accuracy": lambda cell: _bits(cell["correct"]),
    "harmful_loss": lambda cell: np.array(cell["harmful_losses"]),
    "refusal_loss": lambda cell: np.array(cell["refusal_losses"]),
    # how much likelier a token of a refusal is than one of a harmful answer, nats: moves where refusals do not yet
    "refusal_margin": lambda cell: np.array(cell["harmful_losses"]) - np.array(cell["refusal_losses"]),
}
# one value a cell
SCALARS = {
    "positive_heads": lambda cell: cell["divergence"]["positive_heads"],
    "significant_positive_heads": lambda cell: cell["divergence"]["significant_positive_heads"],
    "mean_relu_divergence": lambda cell: cell["divergence"]["mean_relu_divergence"],
    "changed_weights": lambda cell: cell.get("changed_weights"),
    "step_seconds": lambda cell: cell.get("step_seconds"),
    "peak_mib": lambda cell: cell["peak_bytes"] / 2**20 if "peak_bytes" in cell else None,
}


def read_cells(folder):
    """Results of every cell, in the order they were made; an empty list where there is no file."""
    path = Path(folder, CELLS)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append_cell(folder, result):
    """Add one cell's result to FOLDER/cells.jsonl."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, CELLS), "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def groups(results):
    """dict (start, poison, method) -> dict seed -> cell. Raises ValueError on two results of one cell."""
    found = defaultdict(dict)
    for cell in results:
        seeds = found[cell["start"], cell["poison"], cell["method"]]
        if cell["seed"] in seeds:
            raise ValueError(f"two results of the cell {cell['key']!r}")
        seeds[cell["seed"]] = cell
    return dict(found)


def table_rows(results):
    """One dict for each start, poison and method.

    Each quantity has its mean and a 95 % bootstrap interval; `_vs_plain` is the difference to plain fine-tuning
    with the same start, poison, rate, dtype and seeds on the same prompts. Seeds and prompts are both resampled, the
    same draws on both sides of a difference; with one seed the interval is that of the prompts alone.
    """
    found = groups(results)
    rows = []
    for (start, poison, method), cells in sorted(found.items()):
        row = {"start": start, "poison": poison, "method": method, "seeds": len(cells)}
        one = next(iter(cells.values()))
        plain = found.get((start, poison, _plain(one)), {}) if one["defence"] not in ("plain", "none") else {}
        common = sorted(set(cells) & set(plain))
        for name, read in QUANTITIES.items():
            values = np.stack([read(cells[seed]) for seed in sorted(cells)]).astype(float)
            row |= _interval(name, values)
            if common:
                pairs = [read(cells[seed]) - read(plain[seed]).astype(float) for seed in common]
                row |= _interval(f"{name}_vs_plain", np.stack(pairs))
        for name, read in SCALARS.items():
            values = [read(cell) for cell in cells.values()]
            # other work only makes a step slower: the least disturbed run counts
            row[name] = None if None in values else float((np.min if name == "step_seconds" else np.mean)(values))
        rows.append(row)
    return rows


def association(results):
    """Does the divergence tell how safe a model is? Spearman's rho over cells, of each start.

    Returns:
        rows of start, cells ("untouched": no cell whose defence acts on d, or "all"), number, quantity of the
        divergence, of safety, rho and its two-sided p. Empty with fewer than 5 cells.
    """
    from scipy import stats

    rows = []
    for start in sorted({cell["start"] for cell in results}):
        for which in ("untouched", "all"):
            chosen = [c for c in results if c["start"] == start and (which == "all" or c["defence"] != "surgery")]
            if len(chosen) < 5:
                continue
            for measure in ("positive_heads", "mean_relu_divergence"):
                for safety in ("refusal", "refusal_margin"):
                    x = [SCALARS[measure](cell) for cell in chosen]
                    y = [QUANTITIES[safety](cell).mean() for cell in chosen]
                    found = stats.spearmanr(x, y)
                    rows.append(
                        {
                            "start": start,
                            "cells": which,
                            "number": len(chosen),
                            "divergence": measure,
                            "safety": safety,
                            "rho": float(found.statistic),
                            "p": float(found.pvalue),
                        }
                    )
    return rows


def write_table(rows, path):
    """CSV of `table_rows` or `association`. Returns the path."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items() if v is not None})
    return path


def _plain(cell):
    """Method of the plain run that a cell is compared with: trained alike, but for options of its defence."""
    alike = {name: value for name, value in cell["train"].items() if name in ("learning_rate", "weights")}
    return Cell(defence="plain", train=alike).method


def _interval(name, values, seed=0):
    """Mean of [seeds, n] values with the bootstrap interval."""
    draw = np.random.default_rng(seed)
    n_seeds, n = values.shape
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        by_prompt = values[draw.integers(n_seeds, size=n_seeds)].mean(0)
        means[i] = by_prompt[draw.integers(n, size=n)].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    return {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def _bits(text):
    return np.array([one == "1" for one in text], dtype=float)


def _safe_and_coherent(cell):
    """A broken model is not a safe one: refused, and not degenerate."""
    return _bits(cell["refusal"]["strongreject"]) * (1 - _bits(cell["incoherent"]["strongreject"]))
