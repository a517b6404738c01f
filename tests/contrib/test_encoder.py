"""EarlyTom and IPCV: against the authors' code, and the whole encoder row by row."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.contrib.earlytom import EarlyTom, FrameTokens, MergedFrames, Runs, highest_of_stretches, similarities
from evoprune.contrib.ipcv import Follow, Ipcv
from evoprune.methods import EncoderPlan, MethodChain, Stage, Tokens, TowerShape
from evoprune.methods.baselines import Random
from evoprune.vision import Rows, encode_rows, layout
from evoprune.vision.rows import all_units
from tests.contrib.line_by_line import shares
from tests.contrib.public import public_tokens
from tests.methods.tokens import KINDS, Largest, encoded, features_of, plan_of, ranked, snapped
from tests.vision.clips import changes, clip
from tests.vision.devices import assert_same_on_a_gpu, take_gpu_route
from tests.vision.reference import embedded, merged_patches, run_layer
from tests.vision.tower import random_patches, tiny_tower

EARLYTOM = json.loads((Path(__file__).parent / "fixtures/inside/earlytom.json").read_text())["cases"]


@pytest.mark.parametrize("case", [case for case in EARLYTOM if "frames" in case])
def test_merges_the_frames_that_the_public_code_merges(case):
    grid = case["grid"]
    x = public_tokens(case["kind"], case["seed"], tuple(grid)).features.view(grid[0], -1, 32)
    runs, like = Runs(case["threshold"], case["window"]), similarities(x, case["window"])
    assert [[run[0], run[-1]] for run in runs.of(like)] == case["runs"]
    into, weight = runs.merged(like)
    frames = [[i for i in range(grid[0]) if into[i] == f and weight[i]] for f in range(grid[0]) if into[f] == f]
    assert frames == [[frame for frame, _ in of] for of in case["frames"]]
    sums = [sum(float(x[i].sum()) * weight[i] for i in of) for of in frames]
    assert sums == pytest.approx(case["sums"], abs=2e-2, rel=2e-3)


@pytest.mark.parametrize("case", [case for case in EARLYTOM if "share" in case])
def test_keeps_what_the_public_code_keeps_of_a_frame_between_ends(case):
    attention = public_tokens("random", case["seed"], (1, 1, case["places"])).attention
    assert highest_of_stretches(attention, case["share"]).tolist() == case["kept"]


Frame = tuple[list[int], torch.Tensor]  # the frame pairs it represents, the first one first; its rows [n, D]


def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    return snapped(float(torch.nn.functional.cosine_similarity(a, b, dim=1, eps=1e-12).mean()))


def runs_line_by_line(frames: list[Frame], threshold: float, window: int, momentum: float) -> list[list[Frame]]:
    runs, running = [[frames[0]]], 1.0
    for frame in frames[1:]:
        running = momentum * alike(runs[-1][0][1], frame[1]) + (1 - momentum) * running
        if running < threshold or len(runs[-1]) + 1 >= window:
            runs.append([frame])
            running = 1.0
        else:
            runs[-1].append(frame)
    return runs


def merged_line_by_line(frames: list[Frame], threshold: float, window: int, momentum: float) -> list[Frame]:
    left: list[Frame] = []
    for run in runs_line_by_line(frames, threshold, window, momentum):
        if len(run) < 4:
            left += run
            continue
        between, made, at = run[1:-1], [], 0
        ends = alike(run[0][1], run[-1][1])
        like = [alike(a[1], b[1]) for a, b in pairwise(between)] + [0.0]
        while at < len(between) - 1:
            (pairs, x), (others, y) = between[at], between[at + 1]
            if like[at] > ends and like[at] > like[at + 1]:
                share = like[at] / (like[at] + max(0.0, like[at + 1])) if like[at] > 0 else 1.0
                made.append((pairs + others, share * x + (1 - share) * y))
                at += 2
            else:
                made.append((pairs, x))
                at += 1
        if at == len(between) - 1:  # the last one is left over
            made[-1] = (made[-1][0] + between[-1][0], made[-1][1])
        left += [run[0], *made, run[-1]]
    return left


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 14), st.integers(1, 4), st.sampled_from(KINDS), st.integers(0, 500), st.data())
def test_merging_line_by_line(count, places, kind, seed, data):
    threshold, window = data.draw(st.sampled_from([0.6, 0.2, -1.0])), data.draw(st.sampled_from([8, 5, 4, 2]))
    x = features_of(kind, count * places, seed).view(count, places, -1)
    runs = Runs(threshold, window)
    into, weight = runs.merged(similarities(x, window))
    expected = merged_line_by_line([([i], x[i].double()) for i in range(count)], threshold, window, 0.9)
    assert [f for f in range(count) if into[f] == f] == [pairs[0] for pairs, _ in expected]
    for pairs, mean in expected:
        assert all(into[i] == pairs[0] for i in pairs)
        torch.testing.assert_close(sum(weight[i] * x[i].double() for i in pairs), mean, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def earlytom_slowly(visual, patches, grid, method: EarlyTom, after: set[int]) -> list[Frame]:
    """Return the frames that leave the tower with their tokens, computed in float64."""
    geo, depth = layout.geometry(*grid[1:]), len(visual.blocks)
    rows = embedded(visual, patches, geo, math.prod(grid))
    pairs = {pair: [pair] for pair in range(grid[0])}  # the frame pairs represented by each remaining frame pair
    for layer, block in enumerate(visual.blocks):
        if layer in after:
            here = {row.unit: row for row in rows}
            frames = [
                (pairs[p], torch.stack([here[p * geo.units + i].x.flatten() for i in range(geo.units)])) for p in pairs
            ]
            left = merged_line_by_line(frames, method.threshold, method.window, method.momentum)
            pairs = {of[0]: of for of, _ in left}
            rows = [row for row in rows if row.unit // geo.units in pairs]
            for of, x in left:
                for i in range(geo.units):
                    here[of[0] * geo.units + i].x = x[i].view(4, -1)
        run_layer(block, rows, geo, "pair" if layer in visual.fullatt_block_indexes else "window", True)
        if layer == max(visual.fullatt_block_indexes):
            received = {row.unit: row.attention * geo.units for row in rows}
    assert depth not in after
    rows.sort(key=lambda row: row.unit)
    tokens = [merged_patches(visual.merger, row.x) for row in rows]
    attention = [received[row.unit] for row in rows]
    return [
        (of, torch.stack(tokens[i * geo.units : (i + 1) * geo.units]), attention[i * geo.units : (i + 1) * geo.units])
        for i, of in enumerate(pairs.values())
    ]


def tokens_line_by_line(frames: list, units: int, keep: int, method: EarlyTom) -> list[int]:
    """Return the kept units of merged frames, for budgets up to the number of remaining tokens."""
    runs = runs_line_by_line([(of, x) for of, x, _ in frames], method.threshold, method.window, method.momentum)
    ends = [end[0][0] for run in runs for end in (run[0], run[-1])]
    kept = []
    for (of, _, attention), due in zip(frames, shares(min(keep, len(frames) * units), len(frames)), strict=True):
        attention = [snapped(value) for value in attention]
        if of[0] in ends:
            best = ranked(attention)[:due]
        else:
            sizes = [units // due + (i < units % due) for i in range(due)] if due else []
            edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
            best = [max(range(a, b), key=lambda i: (attention[i], -i)) for a, b in pairwise(edges)]
        kept += [of[0] * units + i for i in best]
    return sorted(kept)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("grid", "full_layers", "settings_", "scene"),
    [
        ((9, 4, 5), (1, 3), {"threshold": -1.0}, "noise"),
        ((9, 3, 3), (0, 2), {"threshold": -1.0, "window": 20}, "noise"),
        ((8, 5, 6), (1, 3), {}, "changes"),
        ((7, 3, 5), (3,), {"window": 5}, "one colour"),
        ((1, 3, 4), (1, 3), {}, "noise"),
    ],
)
def test_earlytom_the_whole_encoder_line_by_line(grid, full_layers, settings_, scene):
    visual, method = tiny_tower(full_layers), EarlyTom(**settings_)
    patches = {
        "noise": lambda: random_patches(grid),
        "changes": lambda: clip(grid, changes(grid, 0.1)),
        "one colour": lambda: torch.full((math.prod(grid) * 4, 1176), 0.3),
    }[scene]()
    keep, units = math.prod(grid) // 4, grid[1] * grid[2]
    plan = plan_of(method, TowerShape.of_tower(visual), grid, keep)
    frames = earlytom_slowly(visual, patches, grid, method, {stage.first_layer for stage in plan.row_stages})
    for size in (1, 10**6):
        rows = encode_rows(visual, [patches], plan, piece_units=size)
        assert rows.rows.unit.tolist() == [of[0] * units + i for of, *_ in frames for i in range(units)]
        number = {pair: i for i, (of, *_) in enumerate(frames) for pair in of}
        assert rows.selector_input.unit_to_row.tolist() == [
            number[p] * units + i for p in range(grid[0]) for i in range(units)
        ]
        expected = torch.cat([x for _, x, _ in frames])
        torch.testing.assert_close(rows.selector_input.rows.double(), expected, atol=1e-4, rtol=1e-4)
        received = torch.tensor([value for *_, attention in frames for value in attention])
        torch.testing.assert_close(rows.selector_input.given["attention"], received, atol=1e-4, rtol=1e-4)
        if scene != "one colour":  # where the last bits decide
            assert rows.token_selection().kept.tolist() == tokens_line_by_line(frames, units, keep, method)


@pytest.mark.few(2)
@pytest.mark.parametrize("keep", [1, 5, 90, 130, 179])
def test_earlytom_exactly_the_budget_comes_out(keep):
    """This also holds if the budget exceeds the number of remaining tokens, which are 80 of 180."""
    grid, method = (9, 4, 5), methods.get("earlytom:threshold=-1:window=20")
    for patches in (random_patches(grid), torch.zeros(720, 1176)):
        whole, cut = (encoded(method, patches, grid, keep, piece_units=size) for size in (10**6, 1))
        assert len(whole.kept) == keep and (whole.kept.diff() > 0).all() and whole.features.isfinite().all()
        assert (
            torch.equal(whole.kept, cut.kept)
            and torch.equal(whole.unit_to_row, cut.unit_to_row)
            and whole.layers == cut.layers
        )
        torch.testing.assert_close(whole.features, cut.features, atol=2e-5, rtol=1e-5)
        assert torch.equal(whole.features, whole.rows[whole.unit_to_row[whole.kept]])


def test_more_tokens_than_are_left_are_those_of_frame_pairs_that_merged_away():
    rows, attention = torch.eye(4), torch.tensor([0.1, 0.4, 0.3, 0.2])
    tokens = Tokens(rows, torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]), (4, 1, 2), given={"attention": attention})
    assert FrameTokens().select(tokens, 4).kept.tolist() == [0, 1, 4, 5]
    assert FrameTokens().select(tokens, 6).kept.tolist() == [0, 1, 3, 4, 5, 6]


def test_earlytom_the_plan():
    """The plan has upper bounds, because the content decides; and no merging after the last layer that provides attention."""
    grid, units, merge = (8, 6, 10), 8 * 60, MergedFrames()
    for tower, merges in (
        (TowerShape(32, (7, 15, 23, 31)), [9, 27, 30]),
        (TowerShape(8, (1, 3, 5, 7)), [2, 7]),
        (TowerShape(8, (1, 5)), [2, 5]),
        (TowerShape(1, (0,)), []),
    ):
        plan = methods.MethodChain.parse("earlytom").plan(tower, grid, 40)
        stages = [Stage(layer, units, merge, exact=False, whole_pairs=True) for layer in merges]
        assert plan == EncoderPlan(grid, 40, tower.depth, stages=(*stages, Stage(tower.depth, 40, FrameTokens())))
        assert (plan.layers, plan.rows, plan.exact) == ((units,) * tower.depth, units, not merges)


def test_earlytom_equal_scores_go_by_index():
    assert highest_of_stretches(torch.ones(10), 3).tolist() == [0, 4, 7]


@pytest.mark.parametrize("kernel", [True, False])
def test_earlytom_nothing_but_the_selections_waits_for_a_gpu(kernel, monkeypatch):
    grid, method = (9, 4, 5), methods.get("earlytom:threshold=-1")
    plan, patches = plan_of(method, TowerShape.of_tower(tiny_tower()), grid, 30), random_patches(grid)
    expected = encode_rows(tiny_tower(), [patches], plan)
    with monkeypatch.context() as patch, take_gpu_route(patch, kernel) as mode:
        made = encode_rows(tiny_tower(), [patches], plan, piece_units=40)
        with mode.pause():
            kept = made.select_tokens().kept
    assert torch.equal(kept, expected.select_tokens().kept) and made.layers == expected.layers
    torch.testing.assert_close(made.selector_input.rows, expected.selector_input.rows, atol=1e-4, rtol=1e-4)


def test_earlytom_no_matrix_of_all_pairs():
    """With 16,384 tokens, no tensor is larger than the rows."""
    x = features_of("drift", 16384, width=16)
    tokens = Tokens(x, torch.arange(16384), (64, 16, 16), given={"attention": x[:, 0].abs()})
    with Largest() as largest:
        found = MergedFrames().select(tokens, 4096)
        found.features(x)
        assert len(FrameTokens().select(tokens, 4096).kept) == 4096
    assert len(found.kept) < 16384 and largest.numbers <= 16384 * 16


IPCV = json.loads((Path(__file__).parent / "fixtures/inside/ipcv.json").read_text())
QUESTION = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))


def attended(x: torch.Tensor) -> torch.Tensor:
    """Apply a toy attention: every row reads the mean row."""
    return x + x.mean(0) / 4


def computed(x: torch.Tensor) -> torch.Tensor:
    """Apply a toy MLP that mixes and squares channels."""
    return x + (x.roll(1, -1) * x + x.roll(3, -1)) / 8


def every_unit(values: torch.Tensor, geo, pairs: int) -> Rows:
    return all_units(values, values.new_empty(len(values), 0, 1), geo, pairs)


@pytest.mark.parametrize("case", IPCV["cases"], ids=lambda case: f"{case['grid']}-{case['kind']}")
def test_does_what_the_public_code_does(case):
    """Windows are larger than the frame here, so that rows are in raster order; our row is one patch of theirs."""
    grid, depth, first = case["grid"], case["depth"], case["first"]
    x = public_tokens(case["kind"], case["seed"], tuple(grid)).features
    n = len(x)
    followers = Follow(int(0.35 * n), first + case["follow"], 10).hook(first)
    rows = every_unit(x.view(n, 4, -1), layout.geometry(*grid[1:], side=16), 1)
    rows = followers(0, rows, {})
    for layer in range(depth):
        x = attended(rows.values.flatten(1)).view_as(rows.values)
        active = followers.active
        if active is None:
            rows.values = computed(x.flatten(1)).view_as(x)
        else:
            rows.values = x.index_copy(0, active, computed(x[active].flatten(1)).view(-1, *x.shape[1:]))
        rows = followers(layer + 1, rows, {})
    assert followers._kept.tolist() == case["kept"]
    assert [set(near) for near in followers._near.tolist()] == [set(near) for near in case["near"]]
    torch.testing.assert_close(rows.whole().values.flatten(1).sum(1), torch.tensor(case["sums"]), atol=2e-3, rtol=1e-4)


@torch.no_grad()
def ipcv_slowly(visual, patches, grid, stage: Stage) -> torch.Tensor:
    """Return tokens `[N, D]` for all units, computed in float64."""
    plan = stage.reduce
    geo, depth = layout.geometry(*grid[1:]), len(visual.blocks)
    rows = embedded(visual, patches, geo, math.prod(grid))
    kept, saved, near = None, {}, {}

    def move(row) -> torch.Tensor:
        """Return a dropped row's current state: its saved state plus the mean movement of the rows it follows."""
        return saved[row.unit] + sum(other.x - saved[other.unit] for other in near[row.unit]) / len(near[row.unit])

    live = rows
    for layer, block in enumerate(visual.blocks):
        scope = "pair" if layer in visual.fullatt_block_indexes else "window"
        before = {row.unit: row.x for row in rows}
        run_layer(block, live, geo, scope, True)  # only keys and values matter for following rows
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
    rows.sort(key=lambda row: row.unit)
    return torch.stack([merged_patches(visual.merger, row.x) for row in rows])


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
def test_ipcv_the_whole_encoder_line_by_line(grid, full_layers, first, follow):
    visual, patches = tiny_tower(full_layers), random_patches(grid)
    method = Ipcv(first=first / 4, follow=follow / 4, neighbours=3)
    plan = MethodChain(encoder=method, selector=Random()).plan(TowerShape.of_tower(visual), grid, 5)
    stage, tokens = plan.stages
    assert stage.first_layer == first and tokens.selector == Random()
    assert stage.reduce == Follow(int(0.35 * grid[1] * grid[2]), first + follow, 3)
    expected = ipcv_slowly(visual, patches, grid, stage)
    for size in (1, 10**6):
        rows = encode_rows(visual, [patches], plan, piece_units=size)
        torch.testing.assert_close(rows.selector_input.rows.double(), expected, atol=1e-4, rtol=1e-4)
        assert rows.selector_input.unit_to_row.tolist() == list(range(math.prod(grid)))


def test_ipcv_the_plan():
    tower, units = TowerShape(32, (7, 15, 23, 31)), 4 * 60
    plan = methods.MethodChain.parse("ipcv").plan(tower, (4, 6, 10), 24)
    assert plan.stages[0] == Stage(3, 4 * 21, Follow(21, 10, 10)) and (plan.rows, plan.keep, plan.exact) == (
        units,
        24,
        True,
    )
    assert plan.layers == (units,) * 3 + (4 * 21,) * 29
    for name in ("ipcv:keep=1", "ipcv:first=1"):  # nothing is dropped
        assert len(methods.MethodChain.parse(name).plan(tower, (4, 6, 10), 24).stages) == 1
    assert methods.MethodChain.parse("ipcv").plan(tower, (4, 6, 10), units) == EncoderPlan.full(tower, (4, 6, 10))


GRID = (5, 4, 5)


@pytest.mark.parametrize("name", ["dart", "visionzip", "nuwa", "divprune", "mmr", "random", "par"])
def test_the_selector_sees_every_unit(name):
    """A dropped row has the attention, keys and states of the rows it followed."""
    selector, method = methods.get(name), methods.MethodChain.parse(f"ipcv+{name}")
    patches = random_patches(GRID)
    plan = method.plan(TowerShape.of_tower(tiny_tower()), GRID, 9)
    tokens = encode_rows(tiny_tower(), [patches], plan).selector_input
    assert {what: len(value) for what, value in tokens.given.items()} == dict.fromkeys(selector.needs, 100)
    every = Tokens(tokens.rows, tokens.unit_to_row, GRID, given={**tokens.given, "question": QUESTION})
    for keep in (1, 9, 40):
        made = encoded(method, patches, GRID, keep, question=QUESTION)
        assert torch.equal(made.kept, selector.select(every, keep).kept) and len(made.kept) == keep


def test_dart_is_the_default():
    alone, named = methods.MethodChain.parse("ipcv"), methods.MethodChain.parse("ipcv+dart")
    assert alone.token_selector == named.token_selector and alone.args == named.args and alone.reads_question
    assert not methods.MethodChain.parse("ipcv+divprune").reads_question
    assert methods.MethodChain.parse("ipcv:keep=0.5+scope:alpha=2").args == {
        "keep": 0.5, "first": 3 / 32, "follow": 7 / 32, "neighbours": 10, "scope": {"alpha": 2.0},
    }  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("full_layers", "piece_units"), [((1, 3), 10**6), ((0, 2), 40), ((3,), 1)])
def test_nothing_waits_for_a_gpu(full_layers, piece_units, kernel, monkeypatch):
    method = MethodChain(encoder=Ipcv(), selector=Random())
    assert_same_on_a_gpu(
        monkeypatch, random_patches((3, 5, 7)), (3, 5, 7), method, 20, kernel, full_layers, piece_units
    )


def test_equal_rows_go_by_index():
    followers, rows = Follow(3, 2, 2).hook(1), every_unit(torch.zeros(36, 4, 2), layout.geometry(3, 6), 2)
    followers(0, rows, {})
    rows.values = torch.ones(36, 4, 2)
    followers(1, rows, {})
    assert rows.unit[followers._kept].tolist() == [0, 1, 2, 18, 19, 20]
    assert followers._near.unique(dim=0).tolist() == [[0, 1], [3, 4]]


def test_ipcv_no_matrix_of_all_pairs():
    """With 16,384 units in 64 frame pairs, no tensor is larger than the rows."""
    grid, hidden = (64, 16, 16), 8
    x = features_of("random", 16384, width=4 * hidden).view(-1, 4, hidden)
    followers, rows = Follow(89, 2, 10).hook(1), every_unit(torch.zeros_like(x), layout.geometry(16, 16), 64)
    with Largest() as largest:
        followers(0, rows, {})
        rows.values = x
        for done in range(1, 5):
            rows = followers(done, rows, {})
        rows = rows.whole()
    assert len(rows) == len(rows.values) == math.prod(grid) and largest.numbers <= 64 * 167 * 89 < 16384**2 / 100
