"""Intervals hold what they promise, on data whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.bench.evaluation.scores import accuracy_interval, percentile_interval, resampled


def clustered(random, clusters, each, mean, alike):
    """Right answers of each cluster; `alike`: how much the questions of one cluster stand or fall together (0: not at all)."""
    if alike == 0:
        share = np.full(clusters, mean)
    else:
        spread = (1 - alike) / alike
        share = random.beta(mean * spread, (1 - mean) * spread, clusters)
    return random.binomial(each, share), np.full(clusters, each)


@pytest.mark.full
@pytest.mark.parametrize("alike", [0, 0.2, 0.6])
@pytest.mark.parametrize("mean", [0.5, 0.9])
@pytest.mark.parametrize("clusters", [30, 150])
def test_the_accuracys_interval_covers_the_truth(alike, mean, clusters):
    random = np.random.default_rng(1)
    found = [accuracy_interval(*clustered(random, clusters, 6, mean, alike)) for _ in range(1000)]
    covered = np.mean([low <= mean <= high for low, high in found])
    assert 0.92 <= covered <= 0.98


def test_an_interval_that_ignored_the_clusters_would_not():
    random, naive = np.random.default_rng(1), []
    for _ in range(300):
        right, asked = clustered(random, 50, 6, 0.7, 0.6)
        ones = np.concatenate([np.arange(6) < r for r in right]).astype(int)
        naive.append(accuracy_interval(ones, np.ones(len(ones))))
        assert np.diff(accuracy_interval(right, asked)) > np.diff(naive[-1])
    assert np.mean([low <= 0.7 <= high for low, high in naive]) < 0.85


def test_independent_questions_have_wilsons_interval():
    right = np.array([1] * 45 + [0] * 15)
    low, high = accuracy_interval(right, np.ones(60))
    assert (low, high) == pytest.approx((0.6277, 0.8422), abs=2e-3)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20))
def test_an_interval_holds_its_accuracy(pairs):
    asked = np.array([a + b for a, b in pairs])
    right = np.array([a for a, _ in pairs])
    low, high = accuracy_interval(right, asked)
    assert 0 <= low <= high <= 1
    if asked.sum():
        assert low <= right.sum() / asked.sum() <= high and high - low > 0.01


@pytest.mark.full
@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_the_paired_differences_interval_covers_the_truth(gap):
    random, covered = np.random.default_rng(2), []
    for run in range(250):
        share = random.beta(4, 1, 80)
        full = random.binomial(6, share)
        less = random.binomial(full, 1 - gap / 0.8)  # some right answers are lost
        drawn = resampled(np.stack([full, less, np.full(80, 6)], 1), seed=run, draws=500)
        low, high = percentile_interval((drawn[:, 1] - drawn[:, 0]) / drawn[:, 2])
        covered.append(low - 1e-9 <= -gap <= high + 1e-9)
    assert 0.9 <= np.mean(covered) <= (1.0 if gap == 0 else 0.985)


def test_equal_runs_differ_by_exactly_nothing():
    right = np.random.default_rng(0).integers(0, 7, 40)
    drawn = resampled(np.stack([right, right, np.full(40, 6)], 1))
    assert percentile_interval(drawn[:, 1] / drawn[:, 2] - drawn[:, 0] / drawn[:, 2]) == (0.0, 0.0)


def test_draws_are_of_whole_clusters_and_the_same_again():
    sums = np.stack([np.arange(7) ** 2, np.ones(7)], 1)
    drawn = resampled(sums, seed=3, draws=100)
    assert drawn.shape == (100, 2) and (drawn[:, 1] == 7).all()
    assert (drawn == resampled(sums, seed=3, draws=100)).all()
    assert (drawn[:, 0] == resampled(sums[:, :1], seed=3, draws=100)[:, 0]).all()  # whatever stands beside it
    assert drawn[:, 0].mean() == pytest.approx(sums[:, 0].sum(), rel=0.1)
    assert len(np.unique(resampled(sums, draws=4000)[:, 0])) > 50


@pytest.mark.full
def test_many_clusters_are_drawn_in_parts():
    drawn = resampled(np.ones((50_000, 1)), draws=200)
    assert drawn.shape == (200, 1) and (drawn == 50_000).all()


def test_percentiles_without_numbers():
    assert all(map(math.isnan, percentile_interval(np.array([np.nan, np.inf]))))
    assert percentile_interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
