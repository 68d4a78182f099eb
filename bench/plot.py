"""Every figure of bench/results and of the README, from committed CSVs and nothing else.

    python -m bench.plot

A CSV that is not committed, or changed since, is refused: a figure must be reproducible from the repository.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from surgery.plots import curves as step_curves

from .memory_fit import curves as memory_curves
from .records import read_csv

RESULTS = Path(__file__).parent / "results"


def _axes(panels):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure, path):
    # no date and no version inside: the same CSV gives the same file
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _log_lengths(axes, lengths):
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [str(length) for length in sorted(lengths)], rotation=45, fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_times(path, output):
    """Time of forward and backward against length, one panel a shape, kind and dtype; p20 to p80 shaded."""
    rows = [row for row in read_csv(path) if row["metric"] == "time" and row["p50"] != "" and row["mode"] == "both"]
    panels = {}
    for row in rows:
        lines = panels.setdefault((row["shape"], row["kind"], row["dtype"]), {})
        # a later run of the same case replaces an earlier one
        lines.setdefault(row["impl"], {})[int(row["length"])] = row
    figure, axes = _axes(len(panels))
    for ax, ((shape, kind, dtype), lines) in zip(axes, sorted(panels.items()), strict=True):
        for name, points in sorted(lines.items()):
            lengths = sorted(points)
            middle, low, high = ([1e3 * points[n][q] for n in lengths] for q in ("p50", "p20", "p80"))
            (line,) = ax.plot(lengths, middle, marker="o", markersize=3, label=name, **_style(name))
            ax.fill_between(lengths, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        _log_lengths(ax, {n for points in lines.values() for n in points})
        device = rows[-1]["device"]
        ax.set(xlabel="tokens", ylabel="ms", yscale="log", title=f"{shape}, {kind}, {dtype}\n{device}")
        ax.title.set_fontsize(9)
        ax.legend(frameon=False, fontsize=8)
    return _save(figure, output)


def _style(name):
    if name.endswith("_off"):
        return {"linestyle": "--"}
    return {"linewidth": 2.2} if name.startswith("ours_") else {}


def draw_memory(path, output):
    """Peak memory against length, one panel a shape, kind and dtype; a cross where memory ran out."""
    panels = {}
    for (impl, shape, kind, batch, dtype), curve in memory_curves(read_csv(path)).items():
        panels.setdefault((shape, kind, batch, dtype), {})[impl] = curve
    figure, axes = _axes(len(panels))
    for ax, ((shape, kind, batch, dtype), lines) in zip(axes, sorted(panels.items()), strict=True):
        everything = set()
        for name, (lengths, peaks, failed) in sorted(lines.items()):
            mebibytes = [peak / 2**20 for peak in peaks]
            (line,) = ax.plot(lengths, mebibytes, marker="o", markersize=3, label=name, **_style(name))
            if failed and mebibytes:
                ax.plot(failed[:1], mebibytes[-1:], marker="x", color=line.get_color(), linestyle="none")
            everything |= {*lengths, *failed}
        _log_lengths(ax, everything)
        ax.set(xlabel="tokens", ylabel="peak MiB", yscale="log", title=f"{shape}, {kind}, batch {batch}, {dtype}")
        ax.title.set_fontsize(9)
        ax.legend(frameon=False, fontsize=8)
    return _save(figure, output)


def draw_steps(path, output):
    """Seconds of an optimizer step, one panel a training method, bars grouped by length."""
    rows = [row for row in read_csv(path) if row["metric"] == "step_time" and row["p50"] != ""]
    panels = {}
    for row in rows:
        case = f"{row['length']} tokens, {row['pairs']} pairs"
        panels.setdefault(row["train"], {}).setdefault(case, {})[row["impl"]] = row
    figure, axes = _axes(len(panels))
    for ax, (train, cases) in zip(axes, sorted(panels.items()), strict=True):
        names = sorted({name for case in cases.values() for name in case})
        for i, name in enumerate(names):
            at = [x + 0.8 * (i / len(names) - 0.5) for x, case in enumerate(cases.values()) if name in case]
            found = [case[name] for case in cases.values() if name in case]
            spread = [[row["p50"] - row["p20"] for row in found], [row["p80"] - row["p50"] for row in found]]
            ax.bar(at, [row["p50"] for row in found], 0.8 / len(names), yerr=spread, label=name, align="edge")
        ax.set_xticks(range(len(cases)), list(cases), fontsize=8)
        first = next(iter(next(iter(cases.values())).values()))
        ax.set(ylabel="s a step", title=f"{first['shape']}, {train}, {first['dtype']}")
        ax.title.set_fontsize(9)
        ax.legend(frameon=False, fontsize=8)
    return _save(figure, output)


def draw_curves(path, output):
    """mean relu(d) of training runs, as `surgery plot` draws it."""
    runs = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            line = {"step": int(row["step"]), output.stem: float(row[output.stem])}
            runs.setdefault(row["run"], []).append(line)
    labels = {"mean_relu_divergence": "mean relu(d)", "positive_heads": "heads with d > 0"}
    return step_curves(runs, output.stem, output, labels[output.stem], window=9)


DRAWN = {
    "run.csv": {"run.png": draw_times},
    "memory.csv": {"memory.png": draw_memory},
    "train_step.csv": {"train_step.png": draw_steps},
    "curves.csv": {"mean_relu_divergence.png": draw_curves, "positive_heads.png": draw_curves},
}


def figures(results=RESULTS):
    """List of (CSV, figure, function) under a folder, by the names of DRAWN."""
    found = []
    for path in sorted(Path(results).rglob("*.csv")):
        found += [(path, path.parent / name, draw) for name, draw in DRAWN.get(path.name, {}).items()]
    return found


def uncommitted(path):
    """Why a figure must not be drawn from `path`, or "": it is not in the last commit as it is."""
    git = ["git", "-C", str(path.parent)]
    known = subprocess.run([*git, "ls-files", "--error-unmatch", path.name], capture_output=True, check=False)
    if known.returncode:
        return "not committed"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", path.name], capture_output=True, check=False)
    return "changed since the last commit" if changed.returncode else ""


def main(argv=None):
    """Returns 0, or 1 when a CSV was refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: bench/results)")
    parser.add_argument("--uncommitted", action="store_true", help="draw from CSVs that are not committed, to look")
    options = parser.parse_args(argv)
    refused = False
    todo = figures(options.results)
    if not todo:
        parser.error(f"{options.results} holds none of {', '.join(DRAWN)}")
    for path, figure, draw in todo:
        reason = "" if options.uncommitted else uncommitted(path)
        if reason:
            refused = True
            print(f"refused {path}: {reason}")
        else:
            print(draw(path, figure))
    return int(refused)


if __name__ == "__main__":
    sys.exit(main())
