"""Figures as PNG or SVG: the head-count and penalty curves of runs, and a heat map of divergence per layer and head.

surgery plot runs/plain runs/surgery --output figures
surgery plot --measurement measured/measurement.npz --output figures --format svg
"""

from pathlib import Path

from .flags import print_result


def add_arguments(parser):
    parser.add_argument("runs", nargs="*", help="folders of `surgery train` runs, compared in one figure")
    parser.add_argument("--measurement", help="measurement.npz of `surgery measure`")
    parser.add_argument("--output", default=".", help="folder of the figures (default: here)")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="(default: png)")
    parser.add_argument("--window", type=int, default=9, help="moving average of curves, steps (default: 9)")


def run(arguments):
    import numpy as np

    from ..measure import Measurement
    from ..plots import curves, head_map
    from ..run_files import HISTORY, read_history

    if not arguments.runs and not arguments.measurement:
        raise ValueError("nothing to plot: give run folders, or --measurement")
    folder, ending = Path(arguments.output), arguments.format
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    histories = {}
    for run_folder in arguments.runs:
        history = read_history(run_folder)
        if not history:
            raise ValueError(f"{run_folder}: no {HISTORY} with at least one step")
        histories[Path(run_folder).name] = history
    if histories:
        for key, label in (("penalty", "penalty"), ("positive_heads", "heads with d > 0")):
            written.append(curves(histories, key, folder / f"{key}.{ending}", label, arguments.window))
        for name, history in histories.items():
            tail = np.mean([line["divergence"] for line in history[-arguments.window :]], 0)
            title = f"{name}: mean of the last {min(len(history), arguments.window)} steps"
            written.append(head_map(tail, folder / f"head_map_{name}.{ending}", title))
    if arguments.measurement:
        path = Path(arguments.measurement)
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        with np.load(path) as arrays:
            measured = Measurement(arrays["harmful"], arrays["refusal"])
        written.append(head_map(measured.divergence, folder / f"head_map.{ending}"))
    print_result({"figures": [str(p) for p in written]}, arguments.json, "\n".join(map(str, written)))
    return 0
