"""Check the table of scores against counts made by hand."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.bench.scores import (
    accuracy_interval,
    is_tie,
    percentile_interval,
    precision,
    resampled,
    score_rows,
    share_variance,
    wilson,
)

COST = {
    "tokens": 10,
    "kept_share": 0.5,
    "live_share": 0.5,
    "tflop_3b": 3.0,
    "tflop_3b_tower": 1.0,
    "tflop_3b_prefill": 2.0,
}


def sample(video, row, right, group="time", kind="order", unparseable=False, **more):
    method, budget = {"full": ("none", 1.0), "blind": ("none", 1.0)}.get(row, ("random", 0.5))
    facts = {"video": video, "row": row, "method": method, "budget": budget, "right": right, "unparseable": unparseable}
    return facts | {"type": kind, "groups": [group]} | COST | more


def run(answers):
    """Make samples from {video: [(group, full right, method right), ...]}."""
    made = []
    for video, asked in answers.items():
        made += [sample(video, "full", full, group) for group, full, _ in asked]
        made += [sample(video, "method", less, group, tokens=5) for group, _, less in asked]
    return made


ANSWERS = {
    "b": [("time", True, False), ("space", True, True)],
    "a": [("time", True, True), ("time", False, False)],
    "c": [("time", True, False)],
}


def row_of(rows, name, group):
    (found,) = (row for row in rows if (row["name"], row["group"]) == (name, group))
    return found


def test_counts():
    rows = score_rows(run(ANSWERS))
    assert [(row["name"], row["group"]) for row in rows] == [
        (name, group) for group in ("all", "space", "time", "type:order") for name in ("full", "random -b 0.5")
    ]
    full, less = row_of(rows, "full", "all"), row_of(rows, "random -b 0.5", "all")
    assert (full["n"], full["videos"], full["right"], full["accuracy"]) == (5, 3, 4, 0.8)
    assert (full["difference"], full["kept_of_full"]) == (0, 1)
    assert (less["right"], less["accuracy"], less["difference"], less["kept_of_full"]) == (2, 0.4, -0.4, 0.5)
    assert less["low"] <= 0.4 <= less["high"]
    assert (full["tokens"], less["tokens"], less["tflop_3b"]) == (10, 5, 3)
    time = row_of(rows, "random -b 0.5", "time")
    assert (time["n"], time["videos"], time["right"], time["difference"]) == (4, 3, 1, -0.5)
    space = row_of(rows, "random -b 0.5", "space")
    assert (space["n"], space["videos"], space["accuracy"], space["difference"]) == (1, 1, 1, 0)


def test_equal_answers_differ_by_exactly_nothing():
    for row in score_rows(with_methods(full="1101" * 3, a=("1101" * 3,))):
        assert row["difference"] == row["difference_low"] == row["difference_high"] == 0
        assert row["kept_of_full"] == row["kept_low"] == row["kept_high"] == 1 and is_tie(row, "difference")


def test_a_failed_video_is_in_no_row():
    failed = {"video": "d", "id": "1", "type": "order", "groups": ["time"], "error": {"message": "gone"}}
    again = run({video: ANSWERS[video] for video in ("c", "a", "b")})  # the order of rows does not matter either
    mixed = [s for s in run(ANSWERS) if s["row"] == "full"] + [s for s in again if s["row"] != "full"]
    for samples in (again, mixed):
        assert score_rows([failed, *samples]) == score_rows(run(ANSWERS))
    assert score_rows([failed]) == score_rows([]) == [] and precision([]) is None


def test_nothing_right_in_full():
    assert score_rows(run({"a": [("time", True, False)]}))[1]["kept_of_full"] == 0
    rows = score_rows(run({"a": [("time", False, True)]}))
    assert rows[1]["kept_of_full"] is None and rows[1]["kept_low"] is None and rows[1]["difference"] == 1
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("kind", [None, "order"])
def test_groups_are_there_where_items_carry_them(kind):
    """A group named "all" is merged with the group for all questions."""
    rows = score_rows(
        [
            sample("a", "full", right, kind=kind, unparseable=not right) | {"groups": groups}
            for right, groups in ((True, ["all"]), (False, []))
        ]
    )
    assert [row["group"] for row in rows] == ["all", *(["type:order"] if kind else [])]
    assert (rows[0]["n"], rows[0]["accuracy"], rows[0]["unparseable"]) == (
        2,
        0.5,
        1,
    )  # an answer that names no option is wrong


def with_methods(**right):
    """Make samples of the full budget and of methods at two budgets, one question per video, from texts such as "1101"."""
    made = []
    for video in range(len(right["full"])):
        made.append(sample(f"{video:03}", "full", right["full"][video] == "1"))
        for name, texts in right.items():
            for budget, text in zip((0.5, 0.25), texts if name != "full" else (), strict=False):
                made.append(sample(f"{video:03}", "method", text[video] == "1") | {"method": name, "budget": budget})
    return made


def test_methods_are_compared_with_the_first_one_at_the_same_budget():
    rows = score_rows(with_methods(full="1111" * 10, a=("1110" * 10, "1100" * 10), b=("1101" * 10, "0000" * 10)))
    half, quarter = row_of(rows, "b -b 0.5", "all"), row_of(rows, "b -b 0.25", "all")
    assert (half["first"], half["first_difference"]) == ("a -b 0.5", 0) and is_tie(half, "first_difference")
    assert half["first_difference_low"] < 0 < half["first_difference_high"]  # paired: they miss different questions
    assert (quarter["first"], quarter["first_difference"]) == ("a -b 0.25", -0.5)
    assert not is_tie(quarter, "first_difference") and quarter["difference"] == -1
    for name in ("full", "a -b 0.5", "a -b 0.25"):
        row = row_of(rows, name, "all")
        assert [row[field] for field in row if field.startswith("first")] == [None] * 4
    one = score_rows(with_methods(full="1111", a=("1110",)))
    assert {row["first"] for row in one} == {None}


def test_how_precisely_differences_are_known():
    rows = score_rows(with_methods(full="1" * 60, a=("110" * 20, "1" * 60), b=("1110" * 15, "0" * 30 + "1" * 30)))
    said = "60 questions about 60 videos: differences are accurate to about ±([0-9.]+) points"
    found = re.fullmatch(said, precision(rows))
    compared = [
        (r, f) for r in rows if r["group"] == "all" for f in ("difference", "first_difference") if r[f] is not None
    ]
    widest = max(max(r[f] - r[f + "_low"], r[f + "_high"] - r[f]) for r, f in compared)
    assert float(found[1]) == pytest.approx(100 * widest, abs=0.1) and len(compared) == 7
    # If 4 of 60 videos differ, 1 to 8 do in resamples; the lower end is farther away.
    assert precision(score_rows(with_methods(full="1" * 60, a=("1" * 56 + "0000",)))).endswith("±6.7 points")


@pytest.mark.parametrize(("videos", "points"), [(10, "25.9"), (100, "3.0")])
def test_rows_that_do_not_vary_can_still_differ_in_videos_that_were_not_seen(videos, points):
    said = precision(score_rows(with_methods(full="1" * videos, a=("1" * videos,))))
    assert said.endswith(f" are accurate to about ±{points} points")


@pytest.mark.parametrize("videos", [1, 5, 9, 10])
def test_too_few_videos_for_intervals_of_differences(videos):
    """A bootstrap of one video would give -100.0 (-100.0 to -100.0), as if the difference were known exactly."""
    rows = score_rows(with_methods(full="1" * videos, a=("0" * videos,), b=("1" * videos,)))
    row, said = row_of(rows, "a -b 0.5", "all"), precision(rows)
    ends = {row[f"{name}_{end}"] for name in ("difference", "kept") for end in ("low", "high")}
    assert row["difference"] == -1 and row["low"] < row["high"] and not is_tie(row, "difference")
    assert (ends == {None}) == ("too few videos for intervals of differences" in said) == (videos < 10)
    assert not is_tie(row_of(rows, "b -b 0.5", "all"), "difference") or videos == 10


def clustered(random, clusters, each, mean, alike):
    """Draw the number of right answers per cluster. `alike` is the correlation of the questions in one cluster (0: independent)."""
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


def test_independent_questions_have_wilsons_interval():
    right = np.array([1] * 45 + [0] * 15)
    low, high = accuracy_interval(right, np.ones(60))
    assert (low, high) == pytest.approx((0.6277, 0.8422), abs=2e-3)
    assert share_variance(np.array([1.0, 0.0]), np.ones(2)) == 0.25  # unbiased, for few clusters


@pytest.mark.parametrize(("right", "share", "n"), [(6, 1.0, 10), (0, 0.0, 10), (3, 0.5, 60)])
def test_where_all_clusters_are_alike(right, share, n):
    """If all answers are right or all wrong, the correlation within clusters is unknown, so each cluster counts once."""
    assert accuracy_interval(np.full(10, right), np.full(10, 6)) == wilson(share, n)


@settings(deadline=None, max_examples=200)
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


def test_draws_are_of_whole_clusters_and_the_same_again():
    sums = np.stack([np.arange(7) ** 2, np.ones(7)], 1)
    drawn = resampled(sums, seed=3, draws=100)
    assert drawn.shape == (100, 2) and (drawn[:, 1] == 7).all()
    assert (drawn == resampled(sums, seed=3, draws=100)).all()
    assert (drawn[:, 0] == resampled(sums[:, :1], seed=3, draws=100)[:, 0]).all()  # independent of other columns
    assert drawn[:, 0].mean() == pytest.approx(sums[:, 0].sum(), rel=0.1)
    assert len(np.unique(resampled(sums, draws=4000)[:, 0])) > 50


def test_percentiles_without_numbers():
    assert all(map(math.isnan, percentile_interval(np.array([np.nan, np.inf]))))
    assert percentile_interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
