"""What `surgery measure` concludes and writes: contrasts, CSV, npz, figures and the HTML report."""

import csv
import json
from pathlib import Path

import numpy as np

from .contrast import contrast, match_lengths, null_counts, split_halves
from .measure import SINK_EPSILON, HeadValues, Measurement
from .plots import curves, head_map, histogram, trajectories
from .report import figure, html_page, paragraph, table
from .run_files import write_json

# below so many pairs a length-matched test has no power worth printing
MIN_PAIRS = 10
# columns of the table of contrasts
COUNTS = (
    "positive",
    "significant_positive",
    "bh_positive",
    "negative",
    "significant_negative",
    "bh_negative",
    "significant_smaller_side",
    "expected_by_chance_each_side",
    "mean_relu",
)


def contrasts_of(values, paired=False, before=None, tolerance=0.1, **options):
    """Every contrast of a measurement.

    Args:
        values: dict name -> HeadValues: harmful, refusal, and other reference sets.
        paired: whether row i of every set belongs to the same prompt.
        before: the same sets measured on another checkpoint, or None.
        tolerance: of `match_lengths`.
        options: of `contrast`.
    Returns:
        dict title -> Contrast.
    """
    harmful, found = values["harmful"], {}
    for name in [name for name in values if name != "harmful"]:
        other = values[name]
        title = f"harmful - {name}"
        found[title] = contrast(harmful.alpha, other.alpha, paired=paired, **options)
        first, second = _matched(harmful, other, tolerance)
        if len(first) >= MIN_PAIRS:
            matched = contrast(harmful.alpha[:, first], other.alpha[:, second], paired=True, **options)
            found[f"{title}, length-matched"] = matched
        if before is not None:
            moved = [(v[name].alpha, v["harmful"].alpha) for v in (values, before)]
            change = [after - earlier for after, earlier in zip(*moved, strict=True)]
            found[f"{title}, after - before"] = contrast(change[1], change[0], paired=paired, **options)
    halves = split_halves(harmful.alpha, np.random.default_rng(options.get("seed", 0)))
    if halves[0].shape[1] >= 2:
        found["null: harmful - harmful, one split"] = contrast(*halves, **options)
    return found


def _matched(a, b, tolerance):
    try:
        return match_lengths(a.lengths, b.lengths, tolerance)
    except ValueError:
        return (), ()


def summary_of(values, contrasts, level, seed=0):
    """JSON types: what `Measurement.summary` says, the contrasts, the null, and statistics of every set."""
    summary = Measurement(values["harmful"].alpha, values["refusal"].alpha).summary()
    summary["contrasts"] = {title: one.counts() for title, one in contrasts.items()}
    if values["harmful"].alpha.shape[1] >= 4:
        summary["null"] = null_counts(values["harmful"].alpha, level=level, seed=seed)
    summary["sets"] = {}
    for name, one in values.items():
        first, count = np.unique(one.sinks, return_counts=True)
        summary["sets"][name] = {
            "sequences": len(one.lengths),
            "mean_length": float(one.lengths.mean()),
            "sink_rate": float(one.sink_rate().mean()),
            **{f"mean_{stat}": float(x.mean()) for stat, x in one.stats.items()},
            "sink_positions": dict(zip(map(str, first.tolist()), count.tolist(), strict=True)),
        }
    return summary


def contrast_rows(summary):
    """(header, rows) of the table of contrasts, the null's mean over splits last."""
    rows = []
    for title, counts in summary["contrasts"].items():
        smaller = min(counts["significant_positive"], counts["significant_negative"])
        counts = {**counts, "significant_smaller_side": smaller}
        rows.append((title, *counts["sequences"], *(counts[name] for name in COUNTS)))
    null = summary.get("null")
    if null:
        cells = [null.get(name, "") for name in COUNTS]
        rows.append((f"null: mean of {null['splits']} splits", *null["sequences"], *cells))
        cells = [_range(null.get(f"{name}_range")) for name in COUNTS]
        rows.append(("null: 95 % of splits", *null["sequences"], *cells))
    return ("contrast", "n", "m", *(name.replace("_", " ") for name in COUNTS)), rows


def _range(ends):
    return "" if ends is None else f"{ends[0]:.0f} to {ends[1]:.0f}"


def head_rows(values, main):
    """(header, rows) of the per-head table of the main contrast."""
    columns = {f"{stat}_{name}": x.mean(1) for name, one in values.items() for stat, x in one.stats.items()}
    error = Measurement(values["harmful"].alpha, values["refusal"].alpha).standard_error
    header = ("layer", "head", "divergence", "standard_error", "low", "high", "p", "p_adjusted", *columns)
    arrays = (main.d, error, main.low, main.high, main.p, main.adjusted, *columns.values())
    return header, [(*index, *(float(x[index]) for x in arrays)) for index in np.ndindex(main.d.shape)]


def write_measurement(folder, values, contrasts, summary, settings, histories=None):
    """Write measurement.json and .npz, contrasts.csv, divergence.csv, the figures and report.html.

    Args:
        folder: made if needed.
        values, contrasts, summary: see above.
        settings: JSON dict of how it was measured, shown in the report.
        histories: dict run name -> history lines, for the curves, or None.
    Returns:
        list of the files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "measurement.json", {"summary": summary, **settings})
    save_values(folder / "measurement.npz", values, settings)
    main = contrasts["harmful - refusal"]
    tables = {"contrasts": contrast_rows(summary), "divergence": head_rows(values, main)}
    for name, (header, rows) in tables.items():
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([[f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows])
    figures = _figures(folder, values, contrasts, main, histories or {})
    page = _page(values, summary, settings, tables, figures)
    (folder / "report.html").write_text(page, encoding="utf-8")
    written = ["measurement.json", "measurement.npz", "contrasts.csv", "divergence.csv", "report.html"]
    return [folder / name for name in written] + [path for path, _ in figures]


def save_values(path, values, settings):
    """measurement.npz: alpha of every sequence under the set's name, other statistics as SET_STAT, and the settings."""
    arrays = {name: one.alpha for name, one in values.items()}
    for name, one in values.items():
        arrays |= {f"{name}_{stat}": x for stat, x in one.stats.items() if stat != "sink_mass"}
        arrays |= {f"{name}_lengths": one.lengths, f"{name}_sinks": one.sinks}
    np.savez_compressed(path, **arrays, settings=np.array(json.dumps(settings)))


def load_values(path, names, settings):
    """HeadValues of an earlier measurement.npz, to compare a checkpoint with.

    Args:
        path: measurement.npz.
        names: sets that must be in it.
        settings: of this measurement; data and options must be the same.
    Raises:
        ValueError: no such file, another kind of file, other data or options.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with np.load(path) as arrays:
        if "settings" not in arrays or any(f"{name}_lengths" not in arrays for name in names):
            raise ValueError(f"{path.name}: not a measurement of {', '.join(names)}; measure that checkpoint again")
        earlier = json.loads(str(arrays["settings"]))
        for key in ("data", "config", "limit"):
            if earlier[key] != settings[key]:
                raise ValueError(f"{path.name}: measured with another {key}: {earlier[key]}, now {settings[key]}")
        return {
            name: HeadValues({"sink_mass": arrays[name]}, arrays[f"{name}_lengths"], arrays[f"{name}_sinks"])
            for name in names
        }


def _figures(folder, values, contrasts, main, histories):
    """[(path, caption)] of every figure, drawn."""
    limit = max(float(np.abs(one.d).max()) for one in contrasts.values()) or 1.0
    path = head_map(main.d, folder / "head_map.png", "harmful - refusal", limit, main.adjusted < main.level)
    drawn = [(path, "d of every head; a dot marks heads significant after Benjamini-Hochberg")]
    for title, one in contrasts.items():
        if title.endswith("after - before"):
            path = folder / f"head_map_{title.split(',')[0].split()[-1]}_change.png"
            head_map(one.d, path, title, limit, one.adjusted < one.level, "after - before")
            drawn.append((path, f"{title}: how d of every head moved"))
    shown = {title: one.d for title, one in contrasts.items() if "," not in title or title.startswith("null")}
    drawn.append((histogram(shown, folder / "histogram.png", "d of a head"), "Distribution of d over heads"))
    if histories:
        for key, label in (("positive_heads", "heads with d > 0"), ("mean_relu_divergence", "mean relu(d)")):
            drawn.append((curves(histories, key, folder / f"{key}.png", label, window=9), f"{label} over training"))
        for name, history in histories.items():
            path = trajectories(history, folder / f"trajectories_{name}.png", name)
            drawn.append((path, f"{name}: d of every head over training, moving average"))
    return drawn


def _page(values, summary, settings, tables, figures):
    level = settings["level"]
    per_sequence = [
        (f"{name}-{i + 1}", int(one.lengths[i]), int(one.sinks[i]), float(one.alpha[:, i].mean()))
        for name, one in values.items()
        for i in range(len(one.lengths))
    ]
    sets = summary["sets"]
    keys = [key for key in sets["harmful"] if key != "sink_positions"]
    positions = {name: one["sink_positions"] for name, one in sets.items()}
    sections = [
        (
            "Settings",
            [table(("option", "value"), [(k, json.dumps(v)) for k, v in settings.items()])],
        ),
        (
            "Counts of heads",
            [
                paragraph(
                    f"d is alpha(first set) - alpha(second). Significant: p < {level} of Welch's t test, of the paired "
                    f"test for matched sequences; bh: after Benjamini-Hochberg over all heads. By chance alone "
                    f"{level / 2:.1%} of the heads are significant on each side. The null compares random halves of "
                    f"the harmful rows; heads are correlated, so its range over splits says what chance can do. It "
                    f"moves heads one way or the other, hardly both ways at once: compare the smaller side, too."
                ),
                table(*tables["contrasts"]),
            ],
        ),
        ("Figures", [figure(path, caption) for path, caption in figures]),
        (
            "Sets",
            [
                paragraph(
                    f"sink rate: share of heads with alpha > {SINK_EPSILON} (Gu et al.), mean over sequences. entropy "
                    f"in nats, max_logit the largest score of a sequence's counted rows. Sink positions (position: "
                    f"sequences): {json.dumps(positions)}"
                ),
                table(("set", *keys), [(name, *(one[key] for key in keys)) for name, one in sets.items()]),
            ],
        ),
        ("Heads: harmful - refusal", [table(*tables["divergence"], scroll=True)]),
        (
            "Sequences",
            [
                paragraph("By set and row number of the file; texts are not kept."),
                table(("sequence", "length", "sink", "mean alpha"), per_sequence, scroll=True),
            ],
        ),
    ]
    header, rows = tables["divergence"]
    data = {"summary": summary, "settings": settings, "heads": {"columns": header, "rows": rows}}
    return html_page("Sink divergence", sections, data)
