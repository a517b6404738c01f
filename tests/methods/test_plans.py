"""Plans: budgets, the encoder's, and those of language methods."""

import math
import pickle
import re
from dataclasses import replace
from fractions import Fraction
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.evoprune import FarthestPatches, FarthestPoints
from evoprune.methods.plans import (
    ALLOCATIONS,
    DEFAULT,
    IN_WORDS,
    PRESETS,
    EncoderPlan,
    Stage,
    TowerShape,
    apportion,
    full_plan,
    keep_count,
    keep_tokens,
    largest_share,
    layer_weights,
    parse_budget,
    parse_budget_or_name,
    plain,
    rows_after_layers,
    share_of,
    spread,
)
from evoprune.vision.encoder import encode
from evoprune.vision.tower import tower_shape
from tests.methods.kinds import one_of_each
from tests.methods.tokens import AFTER
from tests.vision.clips import changes, clip
from tests.vision.tower import tiny_tower


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


# Schedules: which layers reduce how much.

towers = st.integers(1, 32).flatmap(
    lambda depth: st.builds(
        lambda full: TowerShape(depth, tuple(sorted(full))), st.sets(st.integers(0, depth - 1), max_size=8)
    )
)
ranges = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
allocations = st.sampled_from(ALLOCATIONS)


# --- weights -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), allocations, ranges)
def test_weights_sum_to_one_over_layers_of_the_range(depth, allocation, ends):
    first, last = ends
    weights = layer_weights(depth, allocation, first, last)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights and all(share > 0 for share in weights.values())
    assert list(weights) == sorted(weights) and set(weights) <= set(range(depth))
    # A layer ends at (l + 1) / depth; the range is met to within one layer.
    for layer in weights:
        assert first - 1 / depth <= (layer + 1) / depth <= last + 1 / depth


@pytest.mark.parametrize(
    ("depth", "first", "last"), [(8, 0, 1), (8, 0.1, 0.5), (32, 0.1, 0.5), (32, 0.25, 0.75), (5, 0, 1)]
)
def test_the_shape_of_each_allocation(depth, first, last):
    weights = {name: layer_weights(depth, name, first, last) for name in ALLOCATIONS}
    layers = list(weights["mean"])
    n = len(layers)
    assert layers == list(range(layers[0], layers[0] + n))
    assert layers[0] + 1 == max(1, math.ceil(first * depth)) and layers[-1] + 1 == round(last * depth)
    for name in ("mean", "skip", "first", "last"):
        assert len({round(share, 12) for share in weights[name].values()}) == 1
    assert list(weights["skip"]) == layers[::-1][::2][::-1]
    half = math.ceil(n / 2)
    assert list(weights["first"]) == layers[:half] and list(weights["last"]) == layers[-half:]
    for name, order in (("increasing", 1), ("decreasing", -1)):
        shares = list(weights[name].values())[::order]
        assert list(weights[name]) == layers
        assert shares == pytest.approx([2 * (i + 1) / (n * (n + 1)) for i in range(n)])


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_a_range_of_no_width_still_has_a_layer(at):
    for name in ALLOCATIONS:
        assert list(layer_weights(8, name, at, at).values()) == [1]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("even", 0, 1),
        ("skip", 0.6, 0.5),
        ("skip", -0.1, 0.5),
        ("skip", 0, 1.1),
        ("mean", math.nan, 1),
        ("mean", 0, math.nan),
    ],
)
def test_other_schedules_are_refused(name, first, last):
    with pytest.raises(ValueError, match="no schedule"):
        layer_weights(8, name, first, last)


# --- rows ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(towers, st.integers(1, 20), st.integers(1, 20), st.data(), allocations, ranges)
def test_row_counts(tower, height, width, data, allocation, ends):
    units, windows = height * width, math.ceil(height / 4) * math.ceil(width / 4)
    keep = data.draw(st.integers(1, units))
    weights = layer_weights(tower.depth, allocation, *ends)
    counts = rows_after_layers(tower, units, windows, keep, weights)
    assert len(counts) == tower.depth
    before, done = units, 0.0
    for layer, left in enumerate(counts):
        done += weights.get(layer, 0)
        wish = units - (units - keep) * done
        assert keep <= left <= before
        if tower.scope(layer) == "pair":
            assert (
                abs(left - wish) <= 0.5 + 1e-6 or left == before
            )  # a layer over whole pairs makes up for all that is missing
        elif left < before:
            assert layer in weights and left >= windows
            assert left == windows or abs(left - wish) <= 0.5 + 1e-6
        before = left
    if any(layer >= max(weights) for layer in tower.full_layers):
        assert counts[-1] == keep


def test_a_window_keeps_a_row_and_the_next_layer_over_whole_pairs_makes_up_for_it():
    tower = TowerShape(4, (1, 3))
    assert rows_after_layers(tower, 32, 2, 1, {0: 1.0}) == [2, 1, 1, 1]
    assert rows_after_layers(tower, 32, 2, 1, {2: 1.0}) == [32, 32, 2, 1]
    assert rows_after_layers(tower, 32, 2, 16, {0: 0.5, 1: 0.5}) == [24, 16, 16, 16]
    assert rows_after_layers(TowerShape(2, ()), 32, 2, 1, {0: 0.5, 1: 0.5}) == [16, 2]


# What methods plan, and that the encoder does what was planned.

SHAPE = TowerShape(8, (1, 3, 5, 7))
GRID = (5, 4, 6)
UNITS = prod(GRID)
QUESTION = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
NAMES = [
    *methods.built_in(),
    "evoprune:reuse=0",
    "evoprune:depth=1",
    "evoprune:within=0.3",
    "reuse+divprune",
    "reuse+pool",
    "ipcv+visionzip",
    "earlytom:threshold=-1",
]


@pytest.mark.parametrize("keep", [1, 12, 77])
@pytest.mark.parametrize("name", one_of_each(NAMES))
def test_the_encoder_computes_what_was_planned(name, keep):
    method = methods.parse(name)
    plan = method.plan(tower_shape(tiny_tower()), GRID, keep)
    patches = clip(plan.grid, changes(plan.grid, 0.3))
    made = encode(tiny_tower(), [patches], plan, question=QUESTION)
    rows = [count for _, count in made.layers]
    assert [layer for layer, _ in made.layers] == list(range(4)) and len(plan.layers) == 4
    if plan.exact:
        assert (rows, len(made.rows)) == (list(plan.layers), plan.rows)
    else:
        assert all(
            count <= most for count, most in zip([*rows, len(made.rows)], [*plan.layers, plan.rows], strict=True)
        )
        assert rows[0] < plan.layers[0] or not plan.reuse or plan.stages[0].first_layer == 0
    if method.exact and plan.prunes:
        assert len(made.kept) == plan.keep == keep
    assert len(made.kept) == len(made.features) and (made.kept.diff() > 0).all() and made.features.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_with_the_whole_budget_every_unit_goes_through_every_layer(name):
    plan = methods.parse(name).plan(SHAPE, GRID, UNITS)
    assert plan == full_plan(SHAPE, GRID) == EncoderPlan(GRID, UNITS, 8)
    assert not plan.prunes and plan.exact and (plan.layers, plan.rows) == ((UNITS,) * 8, UNITS)


@pytest.mark.parametrize("name", AFTER)
def test_a_selector_needs_the_whole_encoder(name):
    stages = (Stage(8, 9, methods.get(name)),)
    plan = methods.parse(name).plan(SHAPE, GRID, 9)
    assert plan == EncoderPlan(GRID, 9, 8, stages=stages)
    assert (plan.layers, plan.rows, plan.exact) == ((UNITS,) * 8, UNITS, True)
    reusing = methods.parse(f"reuse:threshold=5+{name}").plan(SHAPE, GRID, 9)
    assert reusing == replace(plan, reuse=5.0) and not reusing.exact


def test_an_input_method_plans_a_smaller_grid():
    assert methods.parse("subsample").plan(SHAPE, GRID, 50) == full_plan(SHAPE, (2, 4, 6))
    assert methods.parse("downscale").plan(SHAPE, GRID, 35) == full_plan(SHAPE, (5, 2, 3))


def test_evoprune_selects_before_and_between_layers():
    first, rows = round(UNITS * (30 / UNITS) ** 0.4), round(UNITS * (30 / UNITS) ** 0.75)
    layers = (first, *(rows,) * 7)
    plan = methods.parse("evoprune").plan(SHAPE, GRID, 30)
    patches, select = FarthestPatches(average=False), FarthestPoints(average=False)
    stages = (Stage(0, first, patches), Stage(1, rows, select), Stage(8, 30, FarthestPoints()))
    assert plan == EncoderPlan(GRID, 30, 8, 8.0, stages) and not plan.exact
    assert (plan.layers, plan.rows) == (layers, rows)
    assert methods.parse("evoprune:reuse=0").plan(SHAPE, GRID, 30) == replace(plan, reuse=0.0)
    assert replace(plan, reuse=0.0).exact
    assert not methods.parse("evoprune:reuse=0").automatic().plan(SHAPE, GRID, 30).exact  # fewer rows may be enough


def test_one_frame_pair_keeps_more_rows():
    units = 240
    plan = methods.parse("evoprune").plan(SHAPE, (1, 12, 20), 24)
    assert plan.layers == (round(units * 0.1 ** (0.8 / 3)), *(round(units * 0.1**0.5),) * 7)


@pytest.mark.parametrize(("depth", "layers"), [(0.25, 2), (0.125, 1), (0.01, 1), (0.5, 4), (0.99, 7), (1, None)])
def test_after_how_many_layers_evoprune_selects(depth, layers):
    plan = methods.parse(f"evoprune:first=0:rows=1:depth={depth}").plan(SHAPE, GRID, 30)
    assert [stage.first_layer for stage in plan.row_stages] == ([layers] if layers else [])
    assert plan.layers == (UNITS,) * (layers or 8) + (30,) * (8 - (layers or 8)) and plan.rows == plan.layers[-1]


@pytest.mark.parametrize(("power", "rows"), [(1, 30), (0.5, round((UNITS * 30) ** 0.5)), (0, UNITS)])
def test_more_rows_than_tokens_may_go_on(power, rows):
    plan = methods.parse(f"evoprune:first=0:rows={power}").plan(SHAPE, GRID, 30)
    assert (plan.keep, plan.rows, plan.layers) == (30, rows, (UNITS, *(rows,) * 7))
    assert [stage.first_layer for stage in plan.row_stages] == ([1] if rows < UNITS else [])


def test_a_tower_of_one_layer_selects_before_and_after_it():
    plan = methods.parse("evoprune:rows=1").plan(TowerShape(1, (0,)), GRID, 30)
    assert [(stage.first_layer, stage.rows) for stage in plan.stages] == [(0, 69), (0, 30), (1, 30)]


def test_a_merger_plans_rows_for_each_frame_pair():
    plan = methods.parse("tome").plan(TowerShape(4, (1, 3)), (2, 4, 6), 9)  # 4 and 5 of 24
    assert [stage.reduce.left for stage in plan.inside_chunks] == [(19, 19), (14, 14), (9, 10), (4, 5)]
    assert (plan.layers, plan.rows, plan.exact) == ((48, 38, 28, 19), 9, True)


def test_merging_leaves_a_row_in_each_frame_pair_at_least():
    plan = methods.parse("evoprune-merge").plan(SHAPE, GRID, 2)
    assert (plan.keep, plan.rows) == (2, 5)  # the most that were merged are kept of these
    assert plan.stages[-1].reduce.left == (1,) * 5


def test_windows_are_counted_at_the_towers_own_size():
    assert [TowerShape(4, (3,), window).windows(5, 9) for window in (2, 4, 16)] == [15, 6, 1]
    assert [TowerShape(4, (1, 3)).scope(layer) for layer in range(4)] == ["window", "pair"] * 2
