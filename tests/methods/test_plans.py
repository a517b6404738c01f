"""Test how plans distribute tokens over frame pairs, the encoder's plan, and the plans of methods in the language model."""

import math
from dataclasses import replace
from fractions import Fraction
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.methods.evoprune import FarthestPoints
from evoprune.methods.merger import ALLOCATIONS, layer_weights, rows_after_layers
from evoprune.methods.plans import EncoderPlan, Stage, TowerShape, spread
from evoprune.vision import encode_rows
from tests.methods.kinds import NEED_FILES, one_of_each
from tests.methods.tokens import AFTER
from tests.vision.clips import changes, clip
from tests.vision.tower import tiny_tower


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 2000))
def test_spread_is_even_over_every_stretch_of_time(grids, keep):
    shares = spread(keep, grids)
    assert len(shares) == grids and sum(shares) == keep
    for length in (1, 2, 3, grids // 2):
        mean = Fraction(keep * length, grids)
        for at in range(0, grids - length + 1):
            assert math.floor(mean) <= sum(shares[at : at + length]) <= math.ceil(mean)


# Schedules: how much each layer reduces.

towers = st.integers(1, 32).flatmap(
    lambda depth: st.builds(
        lambda full: TowerShape(depth, tuple(sorted(full))), st.sets(st.integers(0, depth - 1), max_size=8)
    )
)
ranges = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
allocations = st.sampled_from(ALLOCATIONS)


@pytest.mark.parametrize(
    ("depth", "first", "last"), [(8, 0, 1), (8, 0.1, 0.5), (32, 0.1, 0.5), (32, 0.25, 0.75), (5, 0, 1)]
)
def test_the_shape_of_each_allocation(depth, first, last):
    weights = {name: layer_weights(depth, name, first, last) for name in ALLOCATIONS}
    layers = list(weights["mean"])
    n = len(layers)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in weights.values())
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


@settings(deadline=None, max_examples=100)
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
            # A layer over whole pairs makes up for all that is missing.
            assert abs(left - wish) <= 0.5 + 1e-6 or left == before
        elif left < before:
            assert layer in weights and left >= windows
            assert left == windows or abs(left - wish) <= 0.5 + 1e-6
        before = left
    if any(layer >= max(weights) for layer in tower.full_layers):
        assert counts[-1] == keep


# Plans of methods, and whether the encoder follows them.

SHAPE = TowerShape(8, (1, 3, 5, 7))
GRID = (5, 4, 6)
UNITS = prod(GRID)
QUESTION = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
NAMES = [
    *(name for name in methods.available(plugins=False) if name not in NEED_FILES),
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
    method = methods.MethodChain.parse(name)
    plan = method.plan(TowerShape.of_tower(tiny_tower()), GRID, keep)
    patches = clip(plan.grid, changes(plan.grid, 0.3))
    made = encode_rows(tiny_tower(), [patches], plan).select_tokens(QUESTION)
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
    plan = methods.MethodChain.parse(name).plan(SHAPE, GRID, UNITS)
    assert plan == EncoderPlan.full(SHAPE, GRID) == EncoderPlan(GRID, UNITS, 8)
    assert not plan.prunes and plan.exact and (plan.layers, plan.rows) == ((UNITS,) * 8, UNITS)


@pytest.mark.parametrize("name", AFTER)
def test_a_selector_needs_the_whole_encoder(name):
    stages = (Stage(8, 9, methods.get(name)),)
    plan = methods.MethodChain.parse(name).plan(SHAPE, GRID, 9)
    assert plan == EncoderPlan(GRID, 9, 8, stages=stages)
    assert (plan.layers, plan.rows, plan.exact) == ((UNITS,) * 8, UNITS, True)
    reusing = methods.MethodChain.parse(f"reuse:threshold=5+{name}").plan(SHAPE, GRID, 9)
    assert reusing == replace(plan, reuse=5.0) and not reusing.exact


def test_an_input_method_plans_a_smaller_grid():
    assert methods.MethodChain.parse("subsample").plan(SHAPE, GRID, 50) == EncoderPlan.full(SHAPE, (2, 4, 6))
    assert methods.MethodChain.parse("downscale").plan(SHAPE, GRID, 35) == EncoderPlan.full(SHAPE, (5, 2, 3))


def test_evoprune_selects_before_and_between_layers():
    first, rows = round(UNITS * (30 / UNITS) ** 0.4), round(UNITS * (30 / UNITS) ** 0.75)
    plan = methods.MethodChain.parse("evoprune").plan(SHAPE, GRID, 30)
    patches, select = FarthestPoints(average=False, before_norm=True), FarthestPoints(average=False)
    stages = (Stage(0, first, patches), Stage(1, rows, select), Stage(8, 30, FarthestPoints()))
    assert plan == EncoderPlan(GRID, 30, 8, 8.0, stages) and not plan.exact
    assert (plan.layers, plan.rows) == ((first, *(rows,) * 7), rows)
    still = methods.MethodChain.parse("evoprune:reuse=0")
    assert still.plan(SHAPE, GRID, 30) == replace(plan, reuse=0.0) and replace(plan, reuse=0.0).exact
    assert not still.automatic().plan(SHAPE, GRID, 30).exact  # fewer rows may be enough


@pytest.mark.parametrize(
    ("settings", "tower", "grid", "stages"),  # after how many layers how many rows are left
    [
        *((f"first=0:rows=1:depth={depth}", SHAPE, GRID, [(layers, 30), (8, 30)][layers == 8 :])
          for depth, layers in ((0.25, 2), (0.125, 1), (0.01, 1), (0.5, 4), (0.99, 7), (1, 8))),
        ("first=0:rows=0.5", SHAPE, GRID, [(1, round((UNITS * 30) ** 0.5)), (8, 30)]),
        ("first=0:rows=0", SHAPE, GRID, [(8, 30)]),
        ("rows=1", TowerShape(1, (0,)), GRID, [(0, 69), (0, 30), (1, 30)]),
        ("", SHAPE, (1, 12, 25), [(0, round(300 * 0.1 ** (0.8 / 3))), (1, round(300 * 0.1**0.5)), (8, 30)]),
    ],
)  # fmt: skip
def test_before_and_between_which_layers_evoprune_selects(settings, tower, grid, stages):
    plan = methods.MethodChain.parse(f"evoprune:{settings}".rstrip(":")).plan(tower, grid, 30)
    assert [(stage.first_layer, stage.rows) for stage in plan.stages] == stages
    rows = [[prod(grid), *(count for at, count in stages if at <= layer)][-1] for layer in range(tower.depth)]
    assert list(plan.layers) == rows


def test_a_merger_plans_rows_for_each_frame_pair():
    plan = methods.MethodChain.parse("tome").plan(TowerShape(4, (1, 3)), (2, 4, 6), 9)  # 4 and 5 of 24
    assert [stage.reduce.left for stage in plan.inside_pairs] == [(19, 19), (14, 14), (9, 10), (4, 5)]
    assert (plan.layers, plan.rows, plan.exact) == ((48, 38, 28, 19), 9, True)
    plan = methods.MethodChain.parse("evoprune-merge").plan(SHAPE, GRID, 2)  # each frame pair keeps at least one row
    assert (plan.keep, plan.rows) == (2, 5) and plan.stages[-1].reduce.left == (1,) * 5
