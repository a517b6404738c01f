"""What methods plan, and that the encoder does what was planned."""

from dataclasses import replace
from math import prod

import pytest
import torch

from evoprune import methods
from evoprune.methods.evoprune import FarthestPatches, FarthestPoints
from evoprune.methods.plans import EncoderPlan, Stage, TowerShape, full_plan
from evoprune.vision.encoder import encode
from evoprune.vision.tower import tower_shape
from tests.methods.kinds import one_of_each
from tests.methods.tokens import AFTER
from tests.vision.clips import changes, clip
from tests.vision.tower import tiny_tower

DEMO = TowerShape(8, (1, 3, 5, 7))
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
    plan = methods.parse(name).plan(DEMO, GRID, UNITS)
    assert plan == full_plan(DEMO, GRID) == EncoderPlan(GRID, UNITS, 8)
    assert not plan.prunes and plan.exact and (plan.layers, plan.rows) == ((UNITS,) * 8, UNITS)


@pytest.mark.parametrize("name", AFTER)
def test_a_selector_needs_the_whole_encoder(name):
    stages = (Stage(8, 9, methods.get(name)),)
    plan = methods.parse(name).plan(DEMO, GRID, 9)
    assert plan == EncoderPlan(GRID, 9, 8, stages=stages)
    assert (plan.layers, plan.rows, plan.exact) == ((UNITS,) * 8, UNITS, True)
    reusing = methods.parse(f"reuse:threshold=5+{name}").plan(DEMO, GRID, 9)
    assert reusing == replace(plan, reuse=5.0) and not reusing.exact


def test_an_input_method_plans_a_smaller_grid():
    assert methods.parse("subsample").plan(DEMO, GRID, 50) == full_plan(DEMO, (2, 4, 6))
    assert methods.parse("downscale").plan(DEMO, GRID, 35) == full_plan(DEMO, (5, 2, 3))


def test_evoprune_selects_before_and_between_layers():
    first, rows = round(UNITS * (30 / UNITS) ** 0.4), round(UNITS * (30 / UNITS) ** 0.75)
    layers = (first, *(rows,) * 7)
    plan = methods.parse("evoprune").plan(DEMO, GRID, 30)
    patches, select = FarthestPatches(average=False), FarthestPoints(average=False)
    stages = (Stage(0, first, patches), Stage(1, rows, select), Stage(8, 30, FarthestPoints()))
    assert plan == EncoderPlan(GRID, 30, 8, 8.0, stages) and not plan.exact
    assert (plan.layers, plan.rows) == (layers, rows)
    assert methods.parse("evoprune:reuse=0").plan(DEMO, GRID, 30) == replace(plan, reuse=0.0)
    assert replace(plan, reuse=0.0).exact
    assert not methods.parse("evoprune:reuse=0").automatic().plan(DEMO, GRID, 30).exact  # fewer rows may be enough


def test_one_frame_pair_keeps_more_rows():
    units = 240
    plan = methods.parse("evoprune").plan(DEMO, (1, 12, 20), 24)
    assert plan.layers == (round(units * 0.1 ** (0.8 / 3)), *(round(units * 0.1**0.5),) * 7)


@pytest.mark.parametrize(("depth", "layers"), [(0.25, 2), (0.125, 1), (0.01, 1), (0.5, 4), (0.99, 7), (1, None)])
def test_after_how_many_layers_evoprune_selects(depth, layers):
    plan = methods.parse(f"evoprune:first=0:rows=1:depth={depth}").plan(DEMO, GRID, 30)
    assert [stage.first_layer for stage in plan.row_stages] == ([layers] if layers else [])
    assert plan.layers == (UNITS,) * (layers or 8) + (30,) * (8 - (layers or 8)) and plan.rows == plan.layers[-1]


@pytest.mark.parametrize(("power", "rows"), [(1, 30), (0.5, round((UNITS * 30) ** 0.5)), (0, UNITS)])
def test_more_rows_than_tokens_may_go_on(power, rows):
    plan = methods.parse(f"evoprune:first=0:rows={power}").plan(DEMO, GRID, 30)
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
    plan = methods.parse("evoprune-merge").plan(DEMO, GRID, 2)
    assert (plan.keep, plan.rows) == (2, 5)  # the most that were merged are kept of these
    assert plan.stages[-1].reduce.left == (1,) * 5


def test_windows_are_counted_at_the_towers_own_size():
    assert [TowerShape(4, (3,), window).windows(5, 9) for window in (2, 4, 16)] == [15, 6, 1]
    assert [TowerShape(4, (1, 3)).scope(layer) for layer in range(4)] == ["window", "pair"] * 2
