"""Figures of the experiment, from its results alone."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .grid import MIDDLE

MAIN = "aligned"
LAMBDA = "surgery lambda_sink="


def draw(results, rows, folder):
    """Write every figure that the results allow. Returns their paths."""
    made = by_poison(rows, folder), by_lambda(rows, folder), heads(results, folder), against_divergence(rows, folder)
    return [path for path in made if path]


def by_poison(rows, folder):
    """Refusals of harmful requests and over-refusals against the share of poisoned rows."""
    found = [row for row in rows if row["start"] == MAIN and row["method"] != "none"]
    lines = {}
    for row in found:
        lines.setdefault(row["method"], []).append(row)
    lines = {method: line for method, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    figure, axes = _figure(2)
    for ax, name, label in zip(
        axes, ("refusal", "over_refusal"), ("refusals, StrongREJECT", "refusals, XSTest safe"), strict=True
    ):
        for number, (method, line) in enumerate(lines.items()):
            # beside one another, so that intervals do not hide each other
            x = [row["poison"] + 0.002 * (number - len(lines) / 2) for row in line]
            _errors(ax, x, line, name, method)
        for row in rows:
            if row["start"] == MAIN and row["method"] == "none":
                ax.axhline(row[name], color="0.5", linestyle=":", label="before fine-tuning")
        ax.set(xlabel="share of poisoned rows", ylabel=label, ylim=(-0.03, 1.03))
    axes[0].legend(frameon=False, fontsize=8)
    return _save(figure, folder, "poison.png")


def by_lambda(rows, folder):
    """Refusals, task loss and penalty against lambda at the middle ratio; plain and mixing as lines."""
    here = [row for row in rows if row["start"] == MAIN and row["poison"] == MIDDLE]
    sweep = sorted(
        (float(row["method"].removeprefix(LAMBDA)), row)
        for row in here
        if row["method"].startswith(LAMBDA) and " " not in row["method"].removeprefix(LAMBDA)
    )
    if len(sweep) < 2:
        return None
    names = {
        "refusal": "refusals, StrongREJECT",
        "task_loss": "GSM8K loss, nats a token",
        "mean_relu_divergence": "mean relu(d), held out",
    }
    figure, axes = _figure(3)
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        _errors(ax, [weight for weight, _ in sweep], [row for _, row in sweep], name, "surgery")
        for method, colour in (("plain", "C1"), ("refusal_mixing", "C2")):
            for row in here:
                if row["method"] == method:
                    ax.axhline(row[name], color=colour, linestyle="--", label=method)
        ax.set(xlabel="lambda", ylabel=label, xscale="log")
    axes[0].legend(frameon=False, fontsize=8)
    return _save(figure, folder, "lambda.png")


def heads(results, folder):
    """Heads with d > 0 and mean relu(d) over training, the first seed at the middle ratio: all saw the same probes."""
    runs = {
        cell["method"]: cell
        for cell in results
        if cell["start"] == MAIN and cell["poison"] == MIDDLE and cell["seed"] == 0
        if "positive_heads_by_step" in cell and "learning_rate" not in cell["train"]
    }
    if not runs:
        return None
    figure, axes = _figure(2, legend=2.6)
    names = {
        "positive_heads_by_step": "heads with d > 0, probe pairs of the step",
        "mean_relu_divergence_by_step": "mean relu(d)",
    }
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        for number, (method, cell) in enumerate(runs.items()):
            values = np.array(cell[name], dtype=float)
            # a step is a few texts: a moving average shows the trend
            smooth = np.convolve(values, np.ones(7) / 7, "valid")
            steps = np.arange(len(smooth)) + 4
            ax.plot(steps, smooth, label=method, linewidth=1.2, color=f"C{number % 10}", linestyle="-:"[number >= 10])
        ax.set(xlabel="optimizer step, moving average over 7", ylabel=label)
        ax.set_ylim(bottom=0)
    axes[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, folder, "heads.png")


def against_divergence(rows, folder):
    """Refusals against the divergence that the regulariser lowers: one point a row of the table."""
    found = [row for row in rows if row["start"] == MAIN]
    if len(found) < 3:
        return None
    figure, axes = _figure(2)
    names = {"positive_heads": "heads with d > 0, held out", "mean_relu_divergence": "mean relu(d), held out"}
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        for number, method in enumerate(dict.fromkeys(row["method"].split()[0] for row in found)):
            mine = [row for row in found if row["method"].split()[0] == method]
            ax.scatter(
                [row[name] for row in mine], [row["refusal"] for row in mine], s=16, label=method, color=f"C{number}"
            )
        ax.set(xlabel=label, ylabel="refusals, StrongREJECT")
        ax.ticklabel_format(axis="x", scilimits=(-2, 3))
    axes[1].legend(frameon=False, fontsize=8)
    return _save(figure, folder, "divergence.png")


def _figure(panels, legend=0.0):
    figure = Figure(figsize=(4.6 * panels + legend, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels)


def _errors(ax, x, rows, name, label):
    y = np.array([row[name] for row in rows])
    low, high = (np.array([row.get(f"{name}_{end}", row[name]) for row in rows]) for end in ("low", "high"))
    ax.errorbar(x, y, [y - low, high - y], label=label, capsize=2, linewidth=1.2)


def _save(figure, folder, name):
    path = Path(folder, name)
    figure.savefig(path, dpi=130)
    return path
