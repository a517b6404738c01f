import math
import pickle
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.errors import UsageError
from evoprune.methods.plans import (
    DEFAULT,
    IN_WORDS,
    PRESETS,
    apportion,
    keep_count,
    keep_tokens,
    largest_share,
    parse_budget,
    parse_budget_or_name,
    plain,
    share_of,
    spread,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("full", 1.0),
        ("1", 1.0),
        ("0.3", 0.3),
        ("1e-6", 1e-6),
        (0.7, 0.7),
        ("10%", 0.1),
        ("12.5 %", 0.125),
        ("100%", 1.0),
    ],
)
def test_parse_budget(text, value):
    assert parse_budget(text) == value


def test_the_default_is_a_preset():
    assert DEFAULT in PRESETS
    assert list(PRESETS.values()) == sorted(PRESETS.values(), reverse=True)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "full"])
def test_a_preset_keeps_its_name_and_a_larger_share_of_a_still(name):
    preset = parse_budget(name)
    assert (preset.name, f"{preset}", f"{preset:g}", plain(preset)) == (name,) * 4 and plain(0.5) == 0.5
    assert preset == pickle.loads(pickle.dumps(preset)) and preset != float(preset)
    assert keep_tokens(preset, (4, 5, 10)) == keep_count(float(preset), 200)
    assert keep_tokens(preset, (1, 10, 20)) == keep_count(preset.still, 200) > keep_tokens(float(preset), (1, 10, 20))


def test_several_inputs_have_one_share_together():
    preset, still, video = PRESETS["fast"], (1, 10, 10), (3, 10, 10)
    assert share_of(preset, [still]) == preset.still and share_of(preset, [video]) == pytest.approx(float(preset))
    assert share_of(preset, [still, video]) == (keep_tokens(preset, still) + keep_tokens(preset, video)) / 400
    assert share_of(0.25, [still]) == largest_share(0.25) == 0.25 and largest_share(preset) == preset.still


@pytest.mark.parametrize(
    "text",
    ["0", "-0.1", "1.0001", "25", "101%", "0%", "%", "nan%", "nan", "inf", "", "Fast", "half", 0, 1.5, math.nan],
)
def test_other_budgets_are_refused_with_the_way_out(text):
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert repr(text) in caught.value.message
    assert all(name in caught.value.hint for name in PRESETS)


@pytest.mark.parametrize(
    ("text", "meant"),
    [("25", "0.25 (or 25%)"), (12.5, "0.125 (or 12.5%)"), ("Fast", "fast"), ("balansed", "balanced"), ("atuo", "auto")],
)
def test_what_was_probably_meant(text, meant):
    with pytest.raises(UsageError) as caught:
        parse_budget_or_name(text)
    assert caught.value.hint.startswith(f"did you mean {meant}? ")


@pytest.mark.parametrize(
    ("budget", "units", "keep"),
    [(1.0, 7, 7), (0.5, 4, 2), (0.5, 5, 3), (0.5, 1, 1), (0.1, 4, 1), (1e-9, 1000, 1), (0.25, 6, 2), (0.24, 6, 1)],
)
def test_keep_count_rounds_halves_up_and_keeps_at_least_one(budget, units, keep):
    assert keep_count(budget, units) == keep


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 100_000))
def test_keep_count_is_the_nearest_count(budget, units):
    keep = keep_count(budget, units)
    assert 1 <= keep <= units
    assert keep == 1 or abs(keep - budget * units) <= 0.5 + 1e-9
    assert keep_count(1.0, units) == units


@given(st.integers(1, 500), st.integers(0, 2000))
def test_spread_is_even_over_every_stretch_of_time(grids, keep):
    shares = spread(keep, grids)
    assert len(shares) == grids and sum(shares) == keep
    for length in (1, 2, 3, grids // 2):
        mean = Fraction(keep * length, grids)
        for at in range(0, grids - length + 1):
            assert math.floor(mean) <= sum(shares[at : at + length]) <= math.ceil(mean)


def test_spread_below_one_a_grid():
    assert spread(3, 9) == [0, 0, 1] * 3
    assert spread(0, 4) == [0] * 4


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.5, 7.0]), st.integers(0, 9)), min_size=1), st.data())
def test_apportion(groups, data):
    weights, most = zip(*groups, strict=True)
    total = data.draw(st.integers(0, sum(most)))
    counts = apportion(total, weights, most)
    assert sum(counts) == total and all(0 <= count <= limit for count, limit in zip(counts, most, strict=True))
    free = [i for i in range(len(groups)) if counts[i] < most[i]]
    for i in free:
        for j in free:
            if weights[i] > weights[j]:  # with more weight never less
                assert counts[i] >= counts[j]
            if weights[i] == weights[j] and i < j:  # with the same the first has the odd one
                assert 0 <= counts[i] - counts[j] <= 1
    if all(total * weight <= limit * sum(weights) for weight, limit in groups) and sum(weights):
        assert all(
            abs(count * sum(weights) - total * w) < sum(weights) for count, w in zip(counts, weights, strict=True)
        )


def test_apportion_by_hand():
    assert apportion(10, [1, 1, 1], [10, 10, 10]) == [4, 3, 3]
    assert apportion(10, [5, 1, 1], [4, 10, 10]) == [4, 3, 3]
    assert apportion(10, [8, 1, 1], [2, 3, 10]) == [2, 3, 5]
    assert apportion(5, [0, 0], [9, 9]) == [3, 2] and apportion(5, [1, 0], [3, 9]) == [3, 2]
    assert apportion(99, [1, 2], [3, 4]) == [3, 4] and apportion(0, [1, 2], [3, 4]) == [0, 0]


def test_the_help_says_of_presets_what_the_guide_says():
    said = re.findall(r"(\w+) \(([\d.]+); (?:accuracy )?([\d.]+%), ([\d.]+)x", IN_WORDS)
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text("utf-8")
    for name, share, kept, speed in said:
        assert share == f"{float(PRESETS[name]):g}"
        assert f"| `-b {name}` | {share} | {PRESETS[name].still:g} | {kept} | {speed} times |" in guide
    assert ["full", *(each[0] for each in said)] == list(PRESETS)
