"""Differences of a head statistic between two sets of sequences: intervals, tests, and what chance alone gives.

A head is significant when its own test rejects at `level`. Hundreds of heads are tested at once, so counts come with
what chance gives (`level / 2` of the heads on each side) and with those that survive Benjamini-Hochberg at the same
false discovery rate. scipy does the tests.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Contrast:
    """d = mean(a) - mean(b) of every head.

    Attributes:
        d, low, high: [L, H] difference and its percentile bootstrap interval at 1 - level.
        p: [L, H] two-sided p of Welch's t test, or of the paired t test.
        adjusted: [L, H] Benjamini-Hochberg p over all heads.
        sizes: (N, M) sequences.
        paired: whether row i of a belongs to row i of b.
        level: of tests and intervals.
    """

    d: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    adjusted: np.ndarray
    sizes: tuple
    paired: bool
    level: float

    def counts(self):
        """JSON types: positive and negative heads, those significant alone and under Benjamini-Hochberg."""
        strong, discovered = self.p < self.level, self.adjusted < self.level
        counts = {"heads": int(self.d.size), "sequences": list(self.sizes), "paired": self.paired}
        for name, side in (("positive", self.d > 0), ("negative", self.d < 0)):
            counts[name] = int(side.sum())
            counts[f"significant_{name}"] = int((side & strong).sum())
            counts[f"bh_{name}"] = int((side & discovered).sum())
        counts["expected_by_chance_each_side"] = self.level / 2 * self.d.size
        counts["mean_relu"] = float(np.maximum(self.d, 0).mean())
        return counts


def contrast(a, b, paired=False, level=0.05, resamples=2000, seed=0):
    """Difference of means of every head, with its bootstrap interval and test.

    Args:
        a, b: [L, N, H] and [L, M, H] one value a sequence and head.
        paired: row i of a and of b belong together (N = M): pairs are resampled and tested.
        level: of the interval (1 - level) and of significance, in (0, 0.5).
        resamples: of the bootstrap; sequences are resampled whole, all heads together.
        seed: of the bootstrap.
    Returns:
        Contrast.
    Raises:
        ValueError: other shapes, fewer than two sequences, a value that is not finite, options out of range.
    """
    stats = _scipy_stats()
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    if a.ndim != 3 or b.ndim != 3 or a.shape[::2] != b.shape[::2]:
        raise ValueError(f"need two [L, N, H] with the same L and H, got {a.shape} and {b.shape}")
    if min(a.shape[1], b.shape[1]) < 2 or (paired and a.shape != b.shape):
        raise ValueError(f"need at least 2 sequences a side, and as many if paired; got {a.shape[1]} and {b.shape[1]}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("values must be finite, got NaN or infinity")
    if not 0 < level < 0.5 or resamples < 100:
        raise ValueError(f"level must be in (0, 0.5) and resamples at least 100, got {level} and {resamples}")
    generator = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        if paired:
            draws = resampled_means(a - b, resamples, generator)
            p = stats.ttest_rel(a, b, axis=1).pvalue
        else:
            draws = resampled_means(a, resamples, generator) - resampled_means(b, resamples, generator)
            p = _welch(stats, a, b)
    # no spread at all: nothing to test
    p = np.where(np.isnan(p), 1.0, p)
    low, high = np.quantile(draws, (level / 2, 1 - level / 2), axis=0)
    adjusted = stats.false_discovery_control(p.ravel()).reshape(p.shape)
    return Contrast(a.mean(1) - b.mean(1), low, high, p, adjusted, (a.shape[1], b.shape[1]), paired, level)


def resampled_means(values, resamples, generator):
    """Means over bootstrap samples of the sequences: [L, N, H] -> [R, L, H], as one matrix product."""
    layers, size, heads = values.shape
    counts = generator.multinomial(size, np.full(size, 1 / size), size=resamples)
    flat = values.transpose(1, 0, 2).reshape(size, -1)
    return (counts @ flat / size).reshape(resamples, layers, heads)


def split_halves(values, generator):
    """Two random halves of the sequences of [L, N, H]; of an odd number one is left out."""
    size = values.shape[1] // 2
    order = generator.permutation(values.shape[1])
    return values[:, order[:size]], values[:, order[size : 2 * size]]


def null_counts(values, splits=1000, level=0.05, seed=0):
    """How many heads differ "significantly" between random halves of one and the same set.

    Args:
        values: [L, N, H], N >= 4.
        splits: number of random splits.
    Returns:
        dict of JSON types: the mean and the 2.5 to 97.5 % range over splits of the significant heads on each side,
        and of the smaller of the two counts. Heads are correlated, so a side's range is much wider than independent
        tests would have it; but chance moves heads one way or the other, hardly both ways at once.
    Raises:
        ValueError: fewer than 4 sequences.
    """
    if values.shape[1] < 4:
        raise ValueError(f"halves need at least 4 sequences, got {values.shape[1]}")
    stats, generator = _scipy_stats(), np.random.default_rng(seed)
    found = {"positive": [], "negative": [], "smaller_side": []}
    for _ in range(splits):
        a, b = split_halves(np.asarray(values, dtype=np.float64), generator)
        strong = np.nan_to_num(_welch(stats, a, b), nan=1.0) < level
        d = a.mean(1) - b.mean(1)
        found["positive"].append(int((strong & (d > 0)).sum()))
        found["negative"].append(int((strong & (d < 0)).sum()))
        found["smaller_side"].append(min(found["positive"][-1], found["negative"][-1]))
    result = {"splits": splits, "sequences": [values.shape[1] // 2] * 2}
    for side, counts in found.items():
        result[f"significant_{side}"] = float(np.mean(counts))
        result[f"significant_{side}_range"] = np.quantile(counts, (0.025, 0.975)).tolist()
    return result


def match_lengths(a, b, tolerance=0.1):
    """Pair sequences of like length, as many as possible.

    Args:
        a, b: lengths, ints.
        tolerance: b may differ by so much of a's length.
    Returns:
        (indices into a, indices into b), int64 arrays of the same size.
    Raises:
        ValueError: a tolerance outside [0, 1), or no pair.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    a, b = np.asarray(a), np.asarray(b)
    rest = iter(np.argsort(b, kind="stable"))
    candidate, pairs = next(rest, None), []
    # shortest first, each takes the shortest partner it may: no other order finds more pairs
    for i in np.argsort(a, kind="stable"):
        while candidate is not None and b[candidate] < a[i] * (1 - tolerance):
            candidate = next(rest, None)
        if candidate is None:
            break
        if b[candidate] <= a[i] * (1 + tolerance):
            pairs.append((i, candidate))
            candidate = next(rest, None)
    if not pairs:
        raise ValueError(f"no two sequences have lengths within {tolerance:.0%} of each other")
    first, second = np.array(pairs, dtype=np.int64).T
    return first, second


def _welch(stats, a, b):
    """[L, H] two-sided p of Welch's t test along the sequences."""
    sides = [x for values in (a, b) for x in (values.mean(1), values.std(1, ddof=1), values.shape[1])]
    return stats.ttest_ind_from_stats(*sides, equal_var=False).pvalue


def _scipy_stats():
    try:
        from scipy import stats
    except ImportError:
        raise ValueError('tests and intervals need scipy: pip install "attention-surgery[hf]"') from None
    return stats
