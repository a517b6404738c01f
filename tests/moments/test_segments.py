"""Cutting a video, the minimum score of a moment, joining, and borders, with numbers only."""

import math
import random
from itertools import pairwise

import pytest

from evoprune.moments.segments import (
    LEAST_SCORE,
    SURE_SCORE,
    Run,
    Segment,
    border,
    cut,
    least_odds,
    log_odds,
    probability,
    runs,
)


def test_a_short_video_is_cut_at_the_models_rate():
    segments = cut(0.0, 60.0, 2.0, 96, 2**18, None)
    assert len(segments) == 8 and segments[0] == Segment(0.0, 7.5, 14) and segments[-1].end_s == 60.0


def test_a_long_video_is_looked_at_less_often():
    """Its tokens stay within the limit, and its segments are long enough for eight frames."""
    segments = cut(0.0, 36_000.0, 2.0, 96, 2**18, None)
    tokens = sum(segment.frames // 2 * 96 for segment in segments)
    assert tokens <= 2**18 and all(segment.frames >= 8 for segment in segments[:1])
    assert segments[0].end_s > 50


@pytest.mark.parametrize(("length_s", "segment_s"), [(0.04, None), (1.0, 0.25), (7.9, 8.0), (8.1, 8.0), (3600.0, 3.0)])
def test_segments_follow_one_another(length_s, segment_s):
    segments = cut(5.0, 5.0 + length_s, 2.0, 1000, 4000, segment_s)
    assert segments[0].start_s == 5.0 and segments[-1].end_s == 5.0 + length_s
    assert all(a.end_s == b.start_s and a.end_s > a.start_s for a, b in pairwise(segments))
    assert all(segment.frames >= 2 and segment.frames % 2 == 0 for segment in segments)


def test_the_rate_that_is_asked_for_has_no_limit():
    segments = cut(0.0, 3600.0, 4.0, 10_000, None, None)
    assert len(segments) == 450 and segments[0].frames == 32


def test_odds_and_probabilities_are_inverses():
    assert [probability(log_odds(p)) for p in (0.01, 0.5, 0.99)] == pytest.approx([0.01, 0.5, 0.99])
    assert (log_odds(0.0), log_odds(1.0)) == (-math.inf, math.inf)
    assert (probability(-math.inf), probability(math.inf)) == (0.0, 1.0)
    assert probability(-1000.0) == 0.0 and probability(1000.0) == 1.0


def test_what_stands_out_is_a_moment_and_noise_is_none():
    rng = random.Random(1)
    noise = [rng.gauss(-5, 1) for _ in range(400)]
    assert least_odds(noise) == log_odds(LEAST_SCORE) > max(noise)
    doubtful = [rng.gauss(1, 0.8) for _ in range(400)]  # a model that says yes to everything
    assert least_odds(doubtful) > log_odds(LEAST_SCORE) and sum(odds >= least_odds(doubtful) for odds in doubtful) == 0
    assert least_odds([*noise, 6.0]) < 6.0


def test_what_is_almost_sure_is_a_moment_however_common():
    assert least_odds([7.0] * 50 + [-5.0] * 50) == log_odds(SURE_SCORE)
    assert least_odds([7.0]) == log_odds(SURE_SCORE)
    assert least_odds([]) == least_odds([-math.inf]) == log_odds(LEAST_SCORE)


def test_neighbours_are_joined_and_the_best_run_is_first():
    found = runs([0.0, 3.0, 5.0, 4.0, 0.0, 6.0, -math.inf, 2.0], 2.0)
    assert found == [Run(5, 5, 5), Run(1, 2, 3), Run(7, 7, 7)]
    assert runs([], 0.0) == runs([-1.0], 0.0) == []


@pytest.mark.parametrize("begins", [2.3, 5.0, 7.7])
def test_a_border_is_found_from_either_side(begins):
    """Frames up to 0.5 s away show it, too."""
    asked = []

    def shown(time_s: float) -> bool:
        asked.append(time_s)
        return time_s + 0.5 >= begins

    assert border(shown, 0.0, 9.0, 0.1, 0.5) == pytest.approx(begins, abs=0.1) and len(asked) <= 9
    found = border(lambda time_s: time_s - 0.5 <= begins, 12.0, 1.0, 0.1, 0.5)
    assert found == pytest.approx(begins, abs=0.1)


def test_what_is_shown_outside_already_begins_there():
    assert border(lambda time_s: True, 3.0, 9.0, 0.1, 0.5) == 3.0
