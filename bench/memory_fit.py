"""Lines and parabolas through peak memory against length, and the longest length that a budget allows."""

import math

import numpy as np

# a parabola explains a linear implementation no better than this share of the largest value
CURVATURE = 0.05


def fit(lengths, values, degree):
    """Least squares of values = c_0 + c_1 N + ... on the relative error.

    Returns:
        (coefficients, largest relative residual).
    Raises:
        ValueError: fewer points than coefficients.
    """
    lengths, values = np.asarray(lengths, float), np.asarray(values, float)
    if len(lengths) <= degree:
        raise ValueError(f"a fit of degree {degree} needs at least {degree + 1} lengths, got {len(lengths)}")
    # relative, so that the longest length does not decide alone; N in units of the longest, for the conditioning
    unit = lengths.max()
    powers = np.vander(lengths / unit, degree + 1, increasing=True)
    scaled = np.linalg.lstsq(powers / values[:, None], np.ones_like(values), rcond=None)[0]
    coefficients = scaled / unit ** np.arange(degree + 1)
    return coefficients, float(np.abs(powers @ scaled / values - 1).max())


def growth(lengths, values):
    """Share of the quadratic term in a parabola's value at the longest length: about 0 for linear growth."""
    (a, b, c), _ = fit(lengths, values, 2)
    longest = max(lengths)
    return c * longest**2 / (a + b * longest + c * longest**2)


def longest(coefficients, budget):
    """The largest length whose fitted peak stays within `budget` bytes; inf when the fit does not grow."""
    a, b, c = [*coefficients, 0.0][:3]
    if c > 0:
        root = b * b - 4 * c * (a - budget)
        return int((-b + math.sqrt(root)) / (2 * c)) if root >= 0 else 0
    return int(max(0.0, (budget - a) / b)) if b > 0 else math.inf


def curves(rows):
    """(impl, shape, kind, batch, dtype) -> (lengths, peaks, lengths that ran out of memory), in order of length."""
    found = {}
    for row in rows:
        if row["metric"] != "peak":
            continue
        key = tuple(row[name] for name in ("impl", "shape", "kind", "batch", "dtype"))
        lengths, peaks, failed = found.setdefault(key, ({}, None, []))
        if row["unit"] == "byte":
            lengths[int(row["length"])] = row["p50"]
        elif row["unit"] == "oom":
            failed.append(int(row["length"]))
    return {
        key: (sorted(points), [points[n] for n in sorted(points)], sorted(failed))
        for key, (points, _, failed) in found.items()
    }


def fit_lines(rows, budget=None):
    """One line of text a curve: its fit, whether it is linear or quadratic, and what fits into `budget` bytes."""
    lines = []
    for (impl, shape, kind, batch, dtype), (lengths, peaks, failed) in curves(rows).items():
        where = f"{impl} ({shape} {kind} batch {batch} {dtype})"
        if len(lengths) < 4:
            lines.append(f"not fitted  {where}: {len(lengths)} lengths, needs 4")
            continue
        share = growth(lengths, peaks)
        linear = share < CURVATURE
        coefficients, residual = fit(lengths, peaks, 1 if linear else 2)
        terms = [f"{x:.4g}" for x in coefficients]
        terms = [
            str(round(coefficients[0])),
            *(f"{x} N{power}" for x, power in zip(terms[1:], ("", "^2"), strict=False)),
        ]
        text = f"{'linear   ' if linear else 'quadratic'}  {where}: {' + '.join(terms)} bytes, within {residual:.1%}"
        text += f", {lengths[0]} to {lengths[-1]} tokens"
        if failed:
            text += f", out of memory at {failed[0]}"
        if budget:
            text += f", about {longest(coefficients, budget)} tokens in {budget / 2**30:.3g} GiB"
        lines.append(text)
    return lines
