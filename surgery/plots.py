"""Figures of runs and measurements. matplotlib is imported inside the functions."""

from pathlib import Path

import numpy as np

FORMATS = (".png", ".svg")


def _axes(width, height):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('figures need matplotlib: pip install "attention-surgery[plot]"') from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure, path):
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"a figure's name must end in one of {', '.join(FORMATS)}, got {path.name!r}")
    figure.savefig(path, dpi=130)
    return path


def head_map(divergence, path, title="sink divergence", limit=None, marked=None, label="harmful - refusal"):
    """Heat map of layers x heads, colours centred at 0.

    Args:
        divergence: [L, H] array.
        path: .png or .svg.
        limit: end of the colour scale; default the largest absolute value.
        marked: [L, H] bool or None: heads to mark with a dot, the significant ones say.
        label: of the colour scale.
    """
    divergence = np.asarray(divergence, dtype=float)
    figure, axes = _axes(1.8 + 0.22 * divergence.shape[1], 1.4 + 0.16 * divergence.shape[0])
    limit = limit or float(np.abs(divergence).max()) or 1.0
    image = axes.imshow(divergence, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set(
        xlabel="head", ylabel="layer", title=f"{title}\n{int((divergence > 0).sum())} of {divergence.size} positive"
    )
    if marked is not None:
        layers, heads = np.nonzero(marked)
        axes.scatter(heads, layers, s=5, color="black", linewidths=0)
    figure.colorbar(image, ax=axes, label=label)
    return _save(figure, path)


def curves(runs, key, path, label, window=1):
    """One line a run over optimizer steps.

    Args:
        runs: dict name -> list of history lines (see run_files.read_history).
        key: what to draw, e.g. "penalty" or "positive_heads".
        path: .png or .svg.
        label: of the y axis.
        window: centred moving average over so many steps; the raw values stay behind it, faint.
    """
    figure, axes = _axes(6.4, 3.6)
    for name, history in runs.items():
        steps = np.array([line["step"] for line in history])
        values = np.array([line[key] for line in history], dtype=float)
        if window > 1 and len(values) >= window:
            (faint,) = axes.plot(steps, values, alpha=0.25, linewidth=0.8)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axes.plot(steps[window // 2 :][: len(smooth)], smooth, label=name, color=faint.get_color())
        else:
            axes.plot(steps, values, label=name)
    axes.set(xlabel="optimizer step", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(figure, path)


def histogram(sets, path, label, bins=60):
    """Outlined histograms of per-head values on one axis.

    Args:
        sets: dict name -> array of any shape.
        path: .png or .svg.
        label: of the x axis.
        bins: number of bins, the same for all sets.
    """
    figure, axes = _axes(6.4, 3.4)
    values = {name: np.asarray(x, dtype=float).ravel() for name, x in sets.items()}
    edges = np.histogram_bin_edges(np.concatenate([*values.values()]), bins)
    for name, x in values.items():
        axes.hist(x, edges, histtype="step", linewidth=1.4, label=name)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set(xlabel=label, ylabel="heads")
    axes.legend(frameon=False)
    return _save(figure, path)


def trajectories(history, path, title, window=9, labelled=6):
    """d of every head over optimizer steps, those that moved most in colour.

    Args:
        history: history lines of one run (see run_files.read_history).
        path: .png or .svg.
        title: of the figure.
        window: trailing moving average over so many steps; a single step is a few texts.
        labelled: how many heads get a colour and a name.
    Raises:
        ValueError: an empty history.
    """
    if not history:
        raise ValueError("trajectories need at least one step of history, got none")
    steps = np.array([line["step"] for line in history])
    d = np.array([line["divergence"] for line in history], dtype=float)
    heads = d.shape[2]
    d = d.reshape(len(d), -1)
    width = max(1, min(window, len(d)))
    total = np.cumsum(np.vstack([np.zeros_like(d[:1]), d]), 0)
    smooth, steps = (total[width:] - total[:-width]) / width, steps[width - 1 :]
    most = np.argsort(-np.abs(smooth[-1] - smooth[0]))[:labelled]
    figure, axes = _axes(6.4, 3.8)
    axes.plot(steps, np.delete(smooth, most, 1), color="0.6", alpha=0.25, linewidth=0.6)
    for head in most:
        axes.plot(steps, smooth[:, head], linewidth=1.4, label=f"layer {head // heads}, head {head % heads}")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="optimizer step", ylabel="d, harmful - refusal", title=title)
    if len(most):
        axes.legend(frameon=False, fontsize=7)
    return _save(figure, path)
