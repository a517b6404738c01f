"""IPCV: dropped rows follow others and come back; against its specification in loops, and against the public code."""

import json
import math
from pathlib import Path

import pytest
import torch

from evoprune import methods
from evoprune.contrib.ipcv import Ipcv
from evoprune.errors import UsageError
from evoprune.methods.baselines import Random
from evoprune.methods.chain import Pipeline
from evoprune.methods.plans import SetAside, Stage, TowerShape, full_plan
from evoprune.methods.types import Tokens
from evoprune.vision.encoder import encode_rows
from evoprune.vision.layout import full_layout, geometry
from evoprune.vision.reductions import Followers
from evoprune.vision.tower import tower_shape
from tests.methods.public_tokens import public_tokens
from tests.methods.tokens import Largest, encoded, features_of
from tests.vision.devices import assert_same_on_a_gpu
from tests.vision.reference import embedded, linear, rms_norm, run_layer
from tests.vision.tower import random_patches, tiny_tower

PUBLIC = json.loads((Path(__file__).parent / "fixtures/inside/ipcv.json").read_text())
QUESTION = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))

# --- the public code ---------------------------------------------------------------------------------------------------


def attended(x: torch.Tensor) -> torch.Tensor:
    """A toy attention: every row reads the mean of all rows."""
    return x + x.mean(0) / 4


def computed(x: torch.Tensor) -> torch.Tensor:
    """A toy MLP: channels are mixed and squared."""
    return x + (x.roll(1, -1) * x + x.roll(3, -1)) / 8


def aside(first: int, *rule: int) -> Stage:
    return Stage(first, 0, SetAside(*rule))


@pytest.mark.parametrize("case", PUBLIC["cases"], ids=lambda case: f"{case['grid']}-{case['kind']}")
def test_does_what_the_public_code_does(case):
    """The windows here are larger than the frame, so that rows are in raster order, and a row is one patch of theirs."""
    grid, depth, first = case["grid"], case["depth"], case["first"]
    x = public_tokens(case["kind"], case["seed"], tuple(grid)).features
    n = len(x)
    followers = Followers(aside(first, int(0.35 * n), first + case["follow"], 10), depth)
    rows, layout = x.view(n, 4, -1), full_layout(geometry(*grid[1:], side=16), 1)
    followers.begin(rows)
    for layer in range(depth):
        rows = attended(rows.flatten(1)).view_as(rows)
        active = followers.active(layer)
        if active is None:
            rows = computed(rows.flatten(1)).view_as(rows)
        else:
            rows = rows.index_copy(0, active, computed(rows[active].flatten(1)).view(-1, *rows.shape[1:]))
        if followers.acts(layer, layout):
            rows, layout = followers.after(layer, "pair", rows, layout, (None, None))
    assert followers._kept.tolist() == case["kept"]
    assert [set(near) for near in followers._near.tolist()] == [set(near) for near in case["near"]]
    torch.testing.assert_close(rows.flatten(1).sum(1), torch.tensor(case["sums"]), atol=2e-3, rtol=1e-4)


# --- line by line ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ipcv_slowly(visual, patches, grid, stage: Stage) -> torch.Tensor:
    """The tokens `[N, D]` of all units, in float64."""
    plan = stage.reduce
    geo, depth = geometry(*grid[1:]), len(visual.blocks)
    rows = embedded(visual, patches, geo, math.prod(grid))
    kept, saved, near = None, {}, {}

    def move(row) -> torch.Tensor:
        """What a dropped row has become: its saved state and the mean movement of the rows that it follows."""
        return saved[row.unit] + sum(other.x - saved[other.unit] for other in near[row.unit]) / len(near[row.unit])

    live = rows
    for layer, block in enumerate(visual.blocks):
        scope = "pair" if layer in visual.fullatt_block_indexes else "window"
        before = {row.unit: row.x for row in rows}
        run_layer(block, live, geo, scope, True)  # for rows that follow, only keys and values count
        done = layer + 1
        if done == stage.first_layer:
            saved, kept = {row.unit: row.x for row in rows}, []
            for pair in range(grid[0]):
                mine = sorted((row for row in rows if row.unit // geo.units == pair), key=lambda row: row.unit)
                change = {row.unit: float((row.x - before[row.unit]).norm()) for row in mine}
                top = max(change.values())
                stay = sorted(mine, key=lambda row: (-round(change[row.unit] / top * 16384), row.unit))[: plan.left]
                for row in mine:
                    if row not in stay:
                        by = sorted(stay, key=lambda other: float((other.x - row.x).norm()))
                        near[row.unit] = by[: plan.neighbours]
                kept += stay
        elif stage.first_layer < done <= plan.until:
            for row in rows:
                if row not in kept:
                    row.x = move(row)
        if done == plan.until:
            live = [row for row in rows if row in kept]
            for row in live:
                row.units = [row.unit]
    if plan.until < depth:
        for row in rows:
            if row not in kept:
                row.x = move(row)
    first, second = visual.merger.mlp[0], visual.merger.mlp[2]
    rows.sort(key=lambda row: row.unit)
    hidden = [linear(first, rms_norm(visual.merger.ln_q, row.x).flatten()) for row in rows]
    return torch.stack([linear(second, torch.nn.functional.gelu(h)) for h in hidden])


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("grid", "full_layers", "first", "follow"),
    [
        ((2, 5, 7), (1, 3), 1, 1),
        ((2, 5, 7), (0, 2), 2, 1),
        ((1, 6, 9), (3,), 1, 0),
        ((3, 4, 4), (1, 3), 1, 3),
        ((2, 3, 3), (0, 1, 2, 3), 3, 1),
    ],
)
def test_the_whole_encoder_line_by_line(grid, full_layers, first, follow):
    visual, patches = tiny_tower(full_layers), random_patches(grid)
    method = Ipcv(first=first / 4, follow=follow / 4, neighbours=3)
    plan = Pipeline(encoder=method, selector=Random()).plan(tower_shape(visual), grid, 5)
    stage, tokens = plan.stages
    assert stage.first_layer == first and tokens.selector == Random()
    assert stage.reduce == SetAside(int(0.35 * grid[1] * grid[2]), first + follow, 3)
    expected = ipcv_slowly(visual, patches, grid, stage)
    for size in (1, 10**6):
        rows = encode_rows(visual, [patches], plan, chunk_units=size)
        torch.testing.assert_close(rows.tokens.rows.double(), expected, atol=1e-4, rtol=1e-4)
        assert rows.tokens.owner.tolist() == list(range(math.prod(grid)))


def test_the_plan():
    tower, units = TowerShape(32, (7, 15, 23, 31)), 4 * 60
    plan = methods.parse("ipcv").plan(tower, (4, 6, 10), 24)
    assert plan.stages[0] == Stage(3, 4 * 21, SetAside(21, 10, 10)) and (plan.rows, plan.keep, plan.exact) == (
        units,
        24,
        True,
    )
    assert plan.layers == (units,) * 3 + (4 * 21,) * 29
    for name in ("ipcv:keep=1", "ipcv:first=1"):  # nothing is dropped
        assert len(methods.parse(name).plan(tower, (4, 6, 10), 24).stages) == 1
    assert methods.parse("ipcv").plan(tower, (4, 6, 10), units) == full_plan(tower, (4, 6, 10))


# --- with a selector ---------------------------------------------------------------------------------------------------

GRID = (5, 4, 5)


@pytest.mark.parametrize("name", ["dart", "visionzip", "nuwa", "divprune", "mmr", "random", "par"])
def test_the_selector_sees_every_unit(name):
    """A row that was dropped has the attention, the keys and the states of the rows that it followed."""
    selector, method = methods.get(name), methods.parse(f"ipcv+{name}")
    patches = random_patches(GRID)
    plan = method.plan(tower_shape(tiny_tower()), GRID, 9)
    tokens = encode_rows(tiny_tower(), [patches], plan).tokens
    assert {what: len(value) for what, value in tokens.given.items()} == dict.fromkeys(selector.needs, 100)
    every = Tokens(tokens.rows, tokens.owner, GRID, given={**tokens.given, "question": QUESTION})
    for keep in (1, 9, 40):
        made = encoded(method, patches, GRID, keep, question=QUESTION)
        assert torch.equal(made.kept, selector.select(every, keep).kept) and len(made.kept) == keep


@pytest.mark.parametrize(("name", "times"), [("visionzip", 1), ("nuwa", 1 + 3)])
def test_dropped_rows_are_moved_where_a_selector_reads_them_and_at_the_end(name, times, monkeypatch):
    calls, real = [], Followers.all_rows
    monkeypatch.setattr(Followers, "all_rows", lambda self, x: calls.append(len(x)) or real(self, x))
    encoded(methods.parse(f"ipcv+{name}"), random_patches(GRID), GRID, 9)
    assert len(calls) == times


def test_dart_is_the_default():
    alone, named = methods.parse("ipcv"), methods.parse("ipcv+dart")
    assert alone.tokens == named.tokens and alone.args == named.args and alone.reads_question
    assert not methods.parse("ipcv+divprune").reads_question
    assert methods.parse("ipcv:keep=0.5+scope:alpha=2").args == {
        "keep": 0.5, "first": 3 / 32, "follow": 7 / 32, "neighbours": 10, "scope": {"alpha": 2.0},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["ipcv+evoprune", "ipcv+tome", "reuse+ipcv", "ipcv+reuse+dart", "ipcv+none"])
def test_it_stands_before_a_selector_alone(name):
    with pytest.raises(UsageError, match="cannot be combined"):
        methods.parse(name)


@pytest.mark.parametrize("setting", ["keep=0", "keep=1.1", "first=-0.1", "follow=2", "neighbours=0"])
def test_settings_out_of_range(setting):
    with pytest.raises(UsageError, match="method ipcv: "):
        methods.get(f"ipcv:{setting}")


# --- everything else ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("full_layers", "chunk_units"), [((1, 3), 10**6), ((0, 2), 40), ((3,), 1)])
def test_nothing_waits_for_a_gpu(full_layers, chunk_units, kernel, monkeypatch):
    method = Pipeline(encoder=Ipcv(), selector=Random())
    assert_same_on_a_gpu(
        monkeypatch, random_patches((3, 5, 7)), (3, 5, 7), method, 20, kernel, full_layers, chunk_units
    )


def test_equal_rows_go_by_index():
    followers, layout = Followers(aside(1, 3, 2, 2), 4), full_layout(geometry(3, 6), 2)
    followers.begin(torch.zeros(36, 4, 2))
    followers.after(0, "pair", torch.ones(36, 4, 2), layout, (None, None))
    assert layout.unit[followers._kept].tolist() == [0, 1, 2, 18, 19, 20]
    assert followers._near.unique(dim=0).tolist() == [[0, 1], [3, 4]]


def test_no_matrix_of_all_pairs():
    """16,384 units at a time, in 64 frame pairs: no tensor is larger than the rows."""
    grid, hidden = (64, 16, 16), 8
    followers, layout = Followers(aside(1, 89, 2, 10), 4), full_layout(geometry(16, 16), 64)
    x = features_of("random", 16384, width=4 * hidden).view(-1, 4, hidden)
    with Largest() as largest:
        followers.begin(torch.zeros_like(x))
        for layer in range(4):
            if followers.acts(layer, layout):
                x, layout = followers.after(layer, "pair", x, layout, (None, None))
    assert len(x) == math.prod(grid) and largest.numbers <= 64 * 167 * 89 < 16384**2 / 100


def test_another_share_of_the_rows_changes_the_tokens():
    patches = random_patches(GRID)
    some, more = (
        encoded(Pipeline(encoder=Ipcv(keep=keep), selector=Random()), patches, GRID, 9) for keep in (0.35, 0.7)
    )
    assert torch.equal(some.kept, more.kept) and (some.features - more.features).norm() > 0.1
    assert [rows for _, rows in some.layers] == [100, 35, 35, 35]
    plain = encoded(Pipeline(encoder=Ipcv(keep=1.0), selector=Random()), patches, GRID, 9)
    assert torch.equal(plain.features, encoded(Random(), patches, GRID, 9).features)
