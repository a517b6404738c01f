"""Test which budgets are accepted, what fraction of an input they keep, and how they appear in records."""

import math
import pickle
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from evoprune.errors import UsageError
from evoprune.methods.budget import AUTO_MOST, Budget
from evoprune.session import PruneOptions
from evoprune.util import OPTION

STILL, VIDEO = (1, 10, 10), (3, 10, 10)


@pytest.mark.parametrize(
    ("given", "value"),
    [("full", 1.0), ("1", 1.0), ("0.3", 0.3), ("1e-6", 1e-6), (0.7, 0.7), ("12.5 %", 0.125), ("100%", 1.0), (1, 1.0)],
)
def test_a_number_is_one_share_of_every_input(given, value):
    budget = Budget.parse(given)
    assert budget == Budget(value, value) == Budget.parse(budget.recorded, auto=True)
    assert (budget.recorded, type(budget.recorded), budget.largest) == (value, float, value)
    assert budget.share(STILL) == budget.share(VIDEO) == budget.share_of_all([STILL, VIDEO]) == value


@pytest.mark.parametrize("name", [name for name in Budget.PRESETS if name != "full"])
def test_a_preset_keeps_its_name_and_a_larger_share_of_a_still(name):
    preset = Budget.parse(name)
    assert preset is Budget.PRESETS[name] and preset.recorded == preset.name == name
    assert preset == pickle.loads(pickle.dumps(preset)) != Budget.parse(preset.video)
    assert len({preset, Budget.parse(preset.recorded), Budget.parse(preset.video)}) == 2
    assert preset.keep((2, 10, 10)) == Budget.count(preset.video, 200)
    assert preset.keep((1, 10, 20)) == Budget.count(preset.still, 200) > Budget.count(preset.video, 200)
    assert preset.largest == preset.still > preset.video
    with pytest.raises(FrozenInstanceError):
        preset.video = 1.0


def test_nothing_is_pruned_by_one_budget_alone():
    assert Budget.PRESETS["full"] is Budget.FULL and Budget.DEFAULT in Budget.PRESETS and Budget.FULL.recorded == 1.0
    assert [budget for budget in Budget.PRESETS.values() if budget == Budget.FULL] == [Budget.FULL]


@pytest.mark.parametrize("name", Budget.AUTOS)
def test_where_the_content_decides_shares_are_limits(name):
    budget = Budget.parse(name, auto=True)
    assert budget == Budget(AUTO_MOST, AUTO_MOST, name)
    assert budget == pickle.loads(pickle.dumps(budget)) and budget.recorded == name
    with pytest.raises(UsageError) as caught:
        Budget.parse(name)
    assert caught.value.message == f"budget {name!r} does not work here"
    assert caught.value.hint.startswith(f"give a share of tokens such as 0.25; {name} works only with VideoQA")


def test_several_inputs_have_one_share_together():
    preset = Budget.PRESETS["fast"]
    assert preset.share_of_all([STILL]) == preset.still
    assert preset.share_of_all([VIDEO]) == pytest.approx(preset.video)
    assert preset.share_of_all([STILL, VIDEO]) == (preset.keep(STILL) + preset.keep(VIDEO)) / 400


@pytest.mark.parametrize(
    "given",
    ["0", "-0.1", "1.0001", "25", "250", "101%", "0%", "%", "nan%", "nan", "inf", "", "Fast", "half", 0, 1.5, math.nan,
     None, [0.5], {}],
)  # fmt: skip
def test_other_budgets_are_refused_with_the_way_out(given):
    with pytest.raises(UsageError) as caught:
        Budget.parse(given)
    assert caught.value.message == f"budget {given!r} is not a share of tokens to keep"
    assert all(name in caught.value.hint for name in Budget.PRESETS)
    assert ("did you mean" in caught.value.hint) == (given in ("1.0001", "25", "Fast", 1.5))


@pytest.mark.parametrize(
    ("given", "meant"),
    [("25", "0.25 (or 25%)"), (12.5, "0.125 (or 12.5%)"), ("Fast", "fast"), ("balansed", "balanced"), ("atuo", "auto")],
)
def test_what_was_probably_meant(given, meant):
    with pytest.raises(UsageError) as caught:
        Budget.parse(given, auto=True)
    assert caught.value.hint.startswith(f"did you mean {meant}? ")
    assert caught.value.hint.endswith("(0.25 or 25% for a quarter), or a name: full, high, balanced, fast or auto")


@pytest.mark.parametrize(
    ("share", "units", "keep"),
    [(1.0, 7, 7), (0.5, 4, 2), (0.5, 5, 3), (0.5, 1, 1), (0.1, 4, 1), (1e-9, 1000, 1), (0.25, 6, 2), (0.24, 6, 1)],
)
def test_keep_count_is_the_nearest_rounds_halves_up_and_keeps_at_least_one(share, units, keep):
    assert Budget.count(share, units) == keep == Budget.parse(share).keep((units, 1, 1))


def test_the_help_says_of_presets_what_the_guide_says():
    (budget,) = (each for each in fields(PruneOptions) if each.name == "budget")
    said = re.findall(r"(\w+) \(([\d.]+); (?:accuracy )?([\d.]+%), ([\d.]+)x", budget.metadata[OPTION].help)
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text("utf-8")
    for name, share, kept, speed in said:
        assert share == f"{Budget.PRESETS[name].video:g}"
        assert f"| `-b {name}` | {share} | {Budget.PRESETS[name].still:g} | {kept} | {speed} times |" in guide
    assert ["full", *(each[0] for each in said)] == list(Budget.PRESETS)
