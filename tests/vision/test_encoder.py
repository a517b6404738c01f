"""The encoder without reuse: at budget 1, with merging between its layers, and with selection after it."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.cpu.linear import pack
from evoprune.methods import parse
from evoprune.methods.baselines import Nothing, Random
from evoprune.methods.evoprune import EvoPrune
from evoprune.methods.evoprune_paper import EvoPrunePaper
from evoprune.methods.plans import ALLOCATIONS, keep_count
from evoprune.methods.registry import built_in
from evoprune.vision import attention
from evoprune.vision.encoder import encode
from evoprune.vision.preprocess import patchify
from evoprune.vision.tower import tower_shape
from tests.methods.kinds import INNER
from tests.methods.tokens import plan_of
from tests.vision.clips import changes, clip
from tests.vision.devices import take_gpu_route, varlen_by_hand
from tests.vision.reference import encode_slowly
from tests.vision.results import assert_same, check_result, encode_noise, encode_patches
from tests.vision.tower import random_patches, tiny_tower

# --- without pruning ---------------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1), (3, 1, 1), (1, 4, 4), (1, 5, 7), (2, 3, 5), (3, 8, 4), (2, 9, 6), (1, 1, 9), (4, 6, 2)]


@pytest.mark.few(8)
@pytest.mark.parametrize("grid", SIZES)
@pytest.mark.parametrize("full_layers", [(1, 3), (), (0, 1, 2, 3)])
def test_budget_one_is_hugging_faces_tower(grid, full_layers):
    visual, patches = tiny_tower(full_layers), random_patches(grid)
    with torch.inference_mode():
        theirs = visual(patches, torch.tensor([[grid[0], grid[1] * 2, grid[2] * 2]])).pooler_output
    for method in (Nothing(), EvoPrune(), EvoPrunePaper(), Random()):
        ours = encode_patches(patches, grid, method, prod(grid), visual)
        torch.testing.assert_close(ours.features, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert torch.equal(ours.kept, torch.arange(prod(grid))) and torch.equal(ours.owner, ours.kept)
        assert ours.live_share == 1 and ours.size is None


@pytest.mark.few(2)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("grid", [(2, 8, 12), (1, 5, 7)])
def test_bf16_is_as_near_to_float32_as_hugging_faces(grid, packed):
    exact, half, own = (deepcopy(tiny_tower()) for _ in range(3))
    half.bfloat16(), own.bfloat16()
    if packed:
        pack(own)
    patches, thw = random_patches(grid), torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]])
    with torch.inference_mode():
        truth = exact(patches, grid_thw=thw).pooler_output
        theirs = half(patches.bfloat16(), grid_thw=thw).pooler_output.float()
    ours = encode_patches(patches.bfloat16(), grid, Nothing(), prod(grid), own).features.float()
    error, usual = ((x - truth).norm() / truth.norm() for x in (ours, theirs))
    assert 0 < error < 1.3 * usual


@pytest.mark.parametrize("keep", [1, 7, 39])
def test_a_selector_after_the_tower_gets_all_rows_and_keeps_some(keep):
    grid = (2, 4, 5)
    whole = encode_noise(grid, Nothing(), 40)
    encoded = encode_noise(grid, Random(), keep, seed=0)
    assert torch.equal(encoded.rows, whole.rows) and len(encoded.kept) == keep
    assert torch.equal(encoded.features, whole.features[encoded.kept])
    check_result(encoded, grid)


# --- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(6)
@pytest.mark.parametrize(
    "name", ["evoprune", "evoprune:reuse=0", "evoprune-merge", "divprune", "reuse+divprune", "downscale"]
)
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.1])
def test_the_layers_compute_the_rows_of_the_plan(name, budget):
    """Exactly so many where the plan is exact; with reuse at most so many, and all where everything changes."""
    grid, method, visual = (6, 4, 6), methods.parse(name), tiny_tower()
    plan = method.plan(tower_shape(visual), grid, keep_count(budget, prod(grid)))
    assert plan.exact == (not plan.reuse)
    for share in (0.0, 0.3, 1.0):
        made = encode(visual, [clip(plan.grid, changes(plan.grid, share))], plan)
        layers, rows = zip(*made.layers, strict=True)
        assert layers == (0, 1, 2, 3) and made.grids == (plan.grid,) and len(made.kept) == plan.keep
        if plan.exact or share == 1.0:
            assert rows == plan.layers and len(made.rows) == plan.rows
        else:
            assert all(count <= most for count, most in zip(rows, plan.layers, strict=True))
            assert len(made.rows) <= plan.rows
            assert rows[0] < plan.layers[0] or (share == 0.3 and plan.stages[0].first_layer == 0)


# --- chunks, pieces and threads ----------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize("method", [Nothing(), Random(), EvoPrunePaper()], ids=lambda method: method.name)
@pytest.mark.parametrize("keep", [3, 40, 100])
def test_the_result_does_not_depend_on_the_chunk_size(method, keep):
    whole, *others = (encode_noise((5, 5, 7), method, keep, chunk_units=size) for size in (10**6, 1, 70, 100))
    for other in others:
        assert_same(other, whole)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["evoprune", "evoprune-paper", "divprune"])
def test_the_result_does_not_depend_on_the_number_of_threads(name):
    grid, made = (4, 6, 8), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            made.append(encode_patches(clip(grid, changes(grid, 0.5)), grid, methods.parse(name), 60))
        finally:
            torch.set_num_threads(1)
    assert_same(*made)


def still_frames(grid, scene: str) -> torch.Tensor:
    """A video in which nothing moves: black, one picture of noise, or noise beside a plain area."""
    t, h, w = grid
    random = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (1, h * 28, w * 28, 3), dtype=torch.uint8, generator=random)
    if scene == "black":
        picture.zero_()
    elif scene == "half plain":
        picture[:, :, w * 14 :] = 60
    return picture.expand(t * 2, -1, -1, -1)


@pytest.mark.few(3)
@pytest.mark.parametrize("scene", ["black", "half plain", "noise"])
@pytest.mark.parametrize(
    ("grid", "keep", "method"),
    [
        ((4, 8, 8), 179, EvoPrunePaper()),
        ((4, 8, 8), 13, EvoPrunePaper()),
        ((3, 6, 9), 16, EvoPrunePaper(features="hidden")),
    ],
)
def test_the_result_does_not_depend_on_the_chunk_size_where_ties_decide(scene, grid, keep, method):
    patches, units = patchify(still_frames(grid, scene)), grid[1] * grid[2]
    whole, *others = (
        encode_patches(patches, grid, method, keep, chunk_units=size) for size in (10**6, 1, 2 * units, 3 * units)
    )
    for other in others:
        assert_same(other, whole)


@pytest.mark.few(4)
@pytest.mark.parametrize("cuts", [[139], [140, 140], [0, 5, 400], [140, 280, 420, 560], [700]])
@pytest.mark.parametrize("chunk_units", [35, 70])
def test_the_result_does_not_depend_on_how_patches_are_cut_into_pieces(cuts, chunk_units):
    grid, method = (5, 5, 7), EvoPrunePaper()
    whole = encode_noise(grid, method, 40, chunk_units=chunk_units)
    pieces = iter(random_patches(grid).tensor_split(cuts))
    assert_same(encode_patches(pieces, grid, method, 40, chunk_units=chunk_units), whole, atol=0)


@pytest.mark.parametrize("rows", [[], [136], [140], [276, 3], [280, 1], [280, 140]], ids=str)
@pytest.mark.parametrize("chunk_units", [1, 10**6])
def test_patches_that_do_not_add_up_are_refused(rows, chunk_units):
    pieces = [torch.zeros(n, 1176) for n in rows]
    with pytest.raises(ValueError, match="patches"):
        encode_patches(pieces, (2, 5, 7), EvoPrunePaper(), 20, chunk_units=chunk_units)


# --- counts ------------------------------------------------------------------------------------------------------------


@st.composite
def papers(draw):
    first, last = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    return EvoPrunePaper(
        allocation=draw(st.sampled_from(ALLOCATIONS)),
        first=first,
        last=last,
        critical=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        neighbours=draw(st.integers(1, 5)),
        features=draw(st.sampled_from(["keys", "keys_rotary", "hidden"])),
        size_bias=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    st.floats(0, 1, exclude_min=True),
    papers(),
    st.sampled_from([(1, 3), (), (0,), (1,), (2,), (0, 1, 2, 3)]),
    st.integers(1, 200),
)
def test_exactly_the_budget_comes_out(grid, budget, method, full_layers, chunk_units):
    keep, visual = keep_count(budget, prod(grid)), tiny_tower(full_layers)
    encoded = encode_noise(grid, method, keep, full_layers, chunk_units=chunk_units)
    plan = plan_of(method, tower_shape(visual), grid, keep)
    assert len(encoded.kept) == len(encoded.features) == keep
    assert encoded.layers == list(enumerate(plan.layers)) and len(encoded.rows) == plan.rows
    assert encoded.live_share == pytest.approx(sum(plan.layers) / 4 / prod(grid))
    check_result(encoded, grid)


@pytest.mark.parametrize("scene", ["black", "half plain"])
@pytest.mark.parametrize("keep", [1, 5, 30, 79])
def test_counts_hold_where_all_scores_are_equal(scene, keep):
    grid = (4, 4, 5)
    encoded = encode_patches(patchify(still_frames(grid, scene)), grid, EvoPrunePaper(), keep)
    assert len(encoded.kept) == keep and encoded.features.isfinite().all()
    check_result(encoded, grid)


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 8])
def test_below_a_token_a_frame_pair_the_whole_clip_is_covered(keep):
    encoded = encode_noise((9, 3, 3), EvoPrunePaper(), keep)
    assert len(encoded.rows) == 9 and len(encoded.kept) == keep
    for length in range(1, 10):  # every stretch of frame pairs has its share, rounded up or down
        for at in range(10 - length):
            assert abs(sum(encoded.kept_per_pair[at : at + length]) - keep * length / 9) < 1


def test_the_largest_rows_are_kept_where_merging_cannot_reach_the_count():
    # No layer attends to whole frame pairs: each of the six windows keeps a row, and four of them must go in the end.
    encoded = encode_noise((1, 5, 12), EvoPrunePaper(), 2, full_layers=())
    assert len(encoded.rows) == 6 and len(encoded.kept) == 2
    sizes = torch.bincount(encoded.owner)
    assert sizes.tolist() == [16, 16, 16, 4, 4, 4]
    assert sizes[encoded.owner[encoded.kept]].tolist() == [16, 16]


@dataclass(frozen=True, eq=False)
class Looks(EvoPrunePaper):
    """Keeps what it is given."""

    seen: list = field(default_factory=list)

    def match(self, candidates, remove):
        self.seen.append(candidates)
        return super().match(candidates, remove)


def test_a_merger_sees_the_places_of_rows_and_how_many_units_they_represent():
    method = Looks(first=0.0, last=1.0)
    encode_noise((3, 5, 7), method, 12, full_layers=(0, 1, 2, 3))
    for seen in method.seen:
        assert seen.width == 7 and torch.equal(seen.size.masked_fill(~seen.valid, 0).sum(1), torch.tensor([35] * 3))
        assert all(
            len({*place[valid].tolist()}) == int(valid.sum())
            for place, valid in zip(seen.place, seen.valid, strict=True)
        )
    assert method.seen[0].place.sort().values.tolist() == [list(range(35))] * 3 and method.seen[-1].size.max() > 1


# --- merging against the slow encoder ----------------------------------------------------------------------------------


def assert_like_the_slow_one(grid, method, keep, full_layers=(1, 3), seed=0):
    units, owner, tokens = encode_slowly(tiny_tower(full_layers), random_patches(grid, seed), grid, method, keep)
    encoded = encode_noise(grid, method, keep, full_layers, seed)
    assert len(units) == keep  # else the reference would have to reduce rows by size too
    assert encoded.kept.tolist() == units
    assert encoded.owner.tolist() == owner
    torch.testing.assert_close(encoded.features.double(), tokens, atol=1e-4, rtol=1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize("keep", [48, 18, 7])  # of 70
@pytest.mark.parametrize("features", ["keys", "keys_rotary", "hidden"])
def test_merging_by_each_feature_against_loops(features, keep):
    assert_like_the_slow_one((2, 5, 7), EvoPrunePaper(features=features), keep)


@pytest.mark.parametrize(
    "settings_",
    [
        {"size_bias": False},
        {"diversity": 0.0, "attention": 0.0, "critical": 0.0},
        {"diversity": -0.5, "attention": 1.0, "neighbours": 1},
        {"diversity": 1.0, "critical": 0.5, "neighbours": 40},
        {"critical": 1.0},
    ],
    ids=str,
)
def test_merging_with_other_weights_against_loops(settings_):
    assert_like_the_slow_one((1, 6, 6), replace(EvoPrunePaper(), **settings_), 9)


@pytest.mark.few(2)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("full_layers", [(1, 3), (0, 3), (2,)])
def test_merging_on_each_schedule_against_loops(allocation, full_layers):
    # With a full-attention layer first, rows own units of other windows when a window layer follows.
    assert_like_the_slow_one((2, 4, 6), EvoPrunePaper(allocation=allocation, first=0, last=0.8), 11, full_layers)


# Every method through the path of a GPU: groups packed for the varlen kernel, or padded without it, equal to the CPU's

GRID = (5, 5, 7)
METHODS = [name for name in built_in() if name not in (*INNER, "downscale", "subsample")]
COMBINED = ["reuse+divprune", "reuse+visionzip", "ipcv+divprune", "ipcv+nuwa"]


def encoded(name: str, chunk_units: int):
    method, visual = parse(name), tiny_tower((1, 3))
    plan = method.plan(tower_shape(visual), GRID, 40)
    random = torch.Generator().manual_seed(1)
    question = torch.randn(6, 24, generator=random) if method.reads_question else None
    patches = clip(GRID, changes(GRID, 0.4))
    return encode(visual, [patches], plan, question=question, chunk_units=chunk_units)


@pytest.mark.few(12)
@pytest.mark.parametrize("chunk_units", [70, 10**6])
@pytest.mark.parametrize("kernel", [True, False], ids=["varlen", "padded"])
@pytest.mark.parametrize("name", [*METHODS, *COMBINED])
def test_every_method_is_the_cpus(name, kernel, chunk_units, monkeypatch):
    expected = encoded(name, chunk_units)
    take_gpu_route(monkeypatch, kernel)  # methods may wait for the device where they select
    calls = []

    def counted(*given, **how):
        calls.append(given)
        return varlen_by_hand(*given, **how)

    monkeypatch.setattr(attention, "varlen_kernel", lambda device, dtype: counted if kernel else None)
    assert_same(encoded(name, chunk_units), expected, atol=1e-4)
    assert bool(calls) == kernel
