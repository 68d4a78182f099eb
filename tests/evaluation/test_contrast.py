"""Contrasts of head statistics: intervals, tests, what chance gives, and pairs of like length."""

import numpy as np
import pytest
from scipy import stats

from surgery.contrast import contrast, match_lengths, null_counts, resampled_means, split_halves

GENERATOR = np.random.default_rng(5)


def samples(size, shift=0.0, layers=4, heads=50, generator=GENERATOR):
    return generator.normal(shift, 1.0, (layers, size, heads))


def test_resampled_means_are_means_of_samples_drawn_with_replacement():
    values = samples(9, layers=2, heads=3)
    means = resampled_means(values, 50, np.random.default_rng(0))
    counts = np.random.default_rng(0).multinomial(9, np.full(9, 1 / 9), size=50)
    for r in (0, 17, 49):
        rows = np.repeat(np.arange(9), counts[r])
        np.testing.assert_allclose(means[r], values[:, rows].mean(1))


@pytest.mark.parametrize("paired", (False, True))
def test_contrast_finds_shifted_heads_and_agrees_with_scipy(paired):
    generator = np.random.default_rng(1)
    a, b = samples(80, generator=generator), samples(80, generator=generator)
    a[0] += 1.0
    a[1] -= 1.0
    if paired:
        common = 5 * samples(80, generator=generator)
        a, b = a + common, b + common
    found = contrast(a, b, paired=paired)
    test = stats.ttest_rel if paired else stats.ttest_ind
    options = {} if paired else {"equal_var": False}
    for head in ((0, 3), (1, 7), (3, 11)):
        first, second = a[head[0], :, head[1]], b[head[0], :, head[1]]
        assert found.p[head] == pytest.approx(test(first, second, **options).pvalue)
        assert found.d[head] == pytest.approx(first.mean() - second.mean())
        interval = stats.bootstrap(
            (first - second,) if paired else (first, second),
            (lambda x, axis: x.mean(axis)) if paired else (lambda x, y, axis: x.mean(axis) - y.mean(axis)),
            method="percentile",
            n_resamples=4000,
            rng=2,
        ).confidence_interval
        np.testing.assert_allclose((found.low[head], found.high[head]), interval, atol=0.05)
    assert (found.low[0] > 0).mean() > 0.9 and (found.adjusted[0] < 0.05).mean() > 0.9
    counts = found.counts()
    assert 45 <= counts["bh_positive"] <= 55 and 45 <= counts["bh_negative"] <= 55
    assert counts["expected_by_chance_each_side"] == 0.025 * 200


def test_intervals_cover_at_their_level():
    generator = np.random.default_rng(3)
    found = contrast(samples(60, 0.3, 10, 200, generator), samples(50, 0.0, 10, 200, generator))
    assert 0.93 < ((found.low < 0.3) & (found.high > 0.3)).mean() < 0.97


def test_benjamini_hochberg_keeps_chance_out():
    generator = np.random.default_rng(4)
    found = contrast(samples(60, 0, 10, 100, generator), samples(60, 0, 10, 100, generator)).counts()
    assert 30 < found["significant_positive"] + found["significant_negative"] < 75
    assert found["bh_positive"] + found["bh_negative"] <= 1


def test_null_counts_show_chance_and_the_spread_correlation_gives():
    generator = np.random.default_rng(6)
    independent = null_counts(samples(80, 0, 10, 100, generator))
    assert 15 < independent["significant_positive"] < 35 and independent["sequences"] == [40, 40]
    common = samples(80, 0, 1, 1, generator) + samples(80, 0, 10, 100, generator)
    wide = null_counts(common)
    spread = [x["significant_positive_range"][1] - x["significant_positive_range"][0] for x in (independent, wide)]
    assert spread[1] > 3 * spread[0]
    # heads that move together are never significant on both sides in numbers
    assert wide["significant_smaller_side_range"][1] < 10 < wide["significant_positive_range"][1]


def test_split_halves_are_disjoint():
    values = np.arange(11.0)[None, :, None]
    a, b = split_halves(values, np.random.default_rng(0))
    assert a.shape == b.shape == (1, 5, 1) and not set(a.ravel()) & set(b.ravel())


def test_match_lengths_pairs_as_many_as_possible():
    generator = np.random.default_rng(7)
    for _ in range(20):
        a, b = generator.integers(5, 60, 12), generator.integers(5, 60, 9)
        first, second = match_lengths(a, b, 0.2)
        assert len(set(first)) == len(set(second)) == len(first)
        assert (np.abs(a[first] - b[second]) <= 0.2 * a[first] + 1e-9).all()
        assert len(first) == _largest_matching(a, b, 0.2)


def _largest_matching(a, b, tolerance):
    """By augmenting paths."""
    owner = {}

    def place(i, seen):
        for j in range(len(b)):
            if abs(a[i] - b[j]) <= tolerance * a[i] + 1e-9 and j not in seen:
                seen.add(j)
                if j not in owner or place(owner[j], seen):
                    owner[j] = i
                    return True
        return False

    return sum(place(i, set()) for i in range(len(a)))


def test_matching_removes_a_difference_that_length_made():
    """alpha falls with length in both sets alike; only their lengths differ."""
    generator = np.random.default_rng(8)
    lengths = generator.integers(20, 100, 300), generator.integers(60, 200, 300)
    a, b = (1 / n[None, :, None] + 1e-4 * generator.normal(size=(1, 300, 40)) for n in lengths)
    first, second = match_lengths(*lengths, 0.02)
    plain, matched = contrast(a, b).d.mean(), contrast(a[:, first], b[:, second], paired=True).d.mean()
    assert len(first) > 30 and abs(matched) < 0.02 * plain


def test_constant_heads_are_not_significant():
    values = np.ones((2, 6, 3))
    found = contrast(values, values)
    assert (found.p == 1).all() and found.counts()["bh_positive"] == 0


@pytest.mark.parametrize(
    "a, b, options",
    [
        (np.ones((2, 5, 3)), np.ones((2, 5, 4)), {}),
        (np.ones((2, 1, 3)), np.ones((2, 5, 3)), {}),
        (np.ones((2, 4, 3)), np.ones((2, 5, 3)), {"paired": True}),
        (np.full((2, 4, 3), np.nan), np.ones((2, 5, 3)), {}),
        (np.ones((2, 4, 3)), np.ones((2, 5, 3)), {"level": 0.7}),
        (np.ones((2, 4, 3)), np.ones((2, 5, 3)), {"resamples": 3}),
    ],
)
def test_contrast_rejects(a, b, options):
    with pytest.raises(ValueError, match="got"):
        contrast(a, b, **options)


def test_match_lengths_rejects():
    with pytest.raises(ValueError, match="no two sequences"):
        match_lengths([10], [100])
    with pytest.raises(ValueError, match="tolerance"):
        match_lengths([10], [10], 1.0)
    with pytest.raises(ValueError, match="4 sequences"):
        null_counts(np.ones((1, 3, 2)))
