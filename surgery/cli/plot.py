"""Figures as PNG or SVG: curves and per-head trajectories of runs, and a heat map of divergence per layer and head.

The curves are the number of heads with d > 0, and mean relu(d), which is the penalty without its lambda and therefore
comparable between runs with any lambda, 0 included. curves.csv holds their values.

surgery plot runs/plain runs/surgery --output figures
surgery plot --measurement measured/measurement.npz --output figures --format svg
"""

import csv
from pathlib import Path

from .flags import print_result

CURVES = {"mean_relu_divergence": "mean relu(d)", "positive_heads": "heads with d > 0"}


def add_arguments(parser):
    parser.add_argument("runs", nargs="*", help="folders of `surgery train` runs, compared in one figure")
    parser.add_argument("--measurement", help="measurement.npz of `surgery measure`")
    parser.add_argument("--output", default=".", help="folder of the figures (default: here)")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="(default: png)")
    parser.add_argument("--window", type=int, default=9, help="moving average of curves, steps (default: 9)")


def write_curves(histories, path):
    """CSV of every run's curves, one line a step. Returns the path."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "step", *CURVES))
        for name, history in histories.items():
            for line in history:
                writer.writerow((name, line["step"], *(f"{line[key]:.6g}" for key in CURVES)))
    return path


def run(arguments):
    import numpy as np

    from ..measure import Measurement
    from ..plots import curves, head_map, trajectories
    from ..run_files import HISTORY, read_history

    if not arguments.runs and not arguments.measurement:
        raise ValueError("nothing to plot: give run folders, or --measurement")
    folder, ending = Path(arguments.output), arguments.format
    histories = {}
    for run_folder in arguments.runs:
        history = read_history(run_folder)
        if not history:
            raise ValueError(f"{run_folder}: no {HISTORY} with at least one step")
        histories[Path(run_folder).name] = history
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if histories:
        written.append(write_curves(histories, folder / "curves.csv"))
        for key, label in CURVES.items():
            written.append(curves(histories, key, folder / f"{key}.{ending}", label, arguments.window))
        for name, history in histories.items():
            tail = np.mean([line["divergence"] for line in history[-arguments.window :]], 0)
            title = f"{name}: mean of the last {min(len(history), arguments.window)} steps"
            written.append(head_map(tail, folder / f"head_map_{name}.{ending}", title))
            written.append(trajectories(history, folder / f"trajectories_{name}.{ending}", name, arguments.window))
    if arguments.measurement:
        path = Path(arguments.measurement)
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        with np.load(path) as arrays:
            measured = Measurement(arrays["harmful"], arrays["refusal"])
        written.append(head_map(measured.divergence, folder / f"head_map.{ending}"))
    print_result({"written": [str(p) for p in written]}, arguments.json, "\n".join(map(str, written)))
    return 0
