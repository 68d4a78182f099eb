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


def head_map(divergence, path, title="sink divergence", limit=None):
    """Heat map of layers x heads, colours centred at 0.

    Args:
        divergence: [L, H] array.
        path: .png or .svg.
        limit: end of the colour scale; default the largest absolute value.
    """
    divergence = np.asarray(divergence, dtype=float)
    figure, axes = _axes(1.8 + 0.22 * divergence.shape[1], 1.4 + 0.16 * divergence.shape[0])
    limit = limit or float(np.abs(divergence).max()) or 1.0
    image = axes.imshow(divergence, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set(
        xlabel="head", ylabel="layer", title=f"{title}\n{int((divergence > 0).sum())} of {divergence.size} positive"
    )
    figure.colorbar(image, ax=axes, label="harmful - refusal")
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
