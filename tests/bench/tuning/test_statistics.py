"""Bounds hold what they promise, also for candidates that never disagree."""

import numpy as np
import pytest

from evoprune.bench.tuning.results import bounds, design_effect, least_tokens, provable, smoothed


def answers(random, shares, videos=16, tokens=60, alike=0.2):
    """Of candidates with these true agreements: agreeing tokens of each video, and its tokens."""
    spread = (1 - alike) / alike
    each = [random.beta(share * spread, (1 - share) * spread, videos) for share in shares]
    return [(random.binomial(tokens, share).astype(float), np.full(videos, float(tokens))) for share in each]


def test_lower_bounds_cover_the_truth():
    random, shares, below = np.random.default_rng(0), (0.995, 0.98, 0.95, 0.9, 0.7), []
    for _ in range(400):
        found = answers(random, shares)
        effect = design_effect(found)
        lows = [bounds(agree.sum() / 960, 960, 16, effect)[0] for agree, _ in found]
        below.append([low <= share for low, share in zip(lows, shares, strict=True)])
    assert (np.mean(below, 0) >= 0.95).all()


def test_no_number_of_agreeing_tokens_proves_everything():
    assert bounds(1.0, 100, 10, 1.0)[0] == pytest.approx(0.963, abs=1e-3)
    assert bounds(1.0, 100, 10, 4.0)[0] < 0.9
    assert bounds(1.0, 100, 10, None) == bounds(1.0, 10, 10, 1.0)
    assert bounds(1.0, 1, 1, None)[0] < 0.25 and bounds(0.0, 5, 2, 1.0)[0] == 0.0


def test_the_design_effect():
    random = np.random.default_rng(1)
    independent = design_effect(answers(random, [0.8] * 40, alike=1e-6))
    alike = design_effect(answers(random, [0.8] * 40, alike=0.3))
    assert 1 <= independent < 1.2 and alike == pytest.approx(1 + 59 * 0.3, rel=0.15)
    never = (np.full(4, 9.0), np.full(4, 9.0))
    assert design_effect([never]) is None and design_effect([(np.ones(1), np.full(1, 2.0))]) is None
    assert design_effect([never, *answers(random, [0.8], videos=4)]) >= 1


@pytest.mark.parametrize("agree", [0.5, 0.9, 0.98, 0.999])
def test_the_least_tokens_are_just_enough(agree):
    least = least_tokens(agree)
    assert provable(least) >= agree > provable(least - 1)
    assert bounds(1.0, least, 9, 1.0)[0] == pytest.approx(provable(least))


def test_agreement_does_not_rise_with_kl():
    agree, tokens, kl = np.array([90, 96, 80, 48]), np.array([100, 100, 100, 50]), np.array([0.1, 0.2, 0.9, 0.5])
    # In the order of KL: 0.9, 0.96, 0.96 and 0.8; the first three share what they have.
    assert smoothed(agree, tokens, kl).tolist() == pytest.approx([0.936, 0.936, 0.8, 0.936])
    steady = np.array([9, 8, 7])
    assert smoothed(steady, np.full(3, 10), np.array([0.0, 0.1, 0.2])).tolist() == pytest.approx([0.9, 0.8, 0.7])
    random = np.random.default_rng(2)
    found = smoothed(random.integers(0, 100, 30), np.full(30, 100), np.arange(30))
    assert (np.diff(found) <= 1e-12).all()
