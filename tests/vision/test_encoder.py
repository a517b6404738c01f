from copy import deepcopy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.methods.none import Nothing
from evoprune.methods.random import Random
from evoprune.model.linear import pack
from evoprune.pruning.budget import keep_count, spread
from evoprune.pruning.schedule import ALLOCATIONS
from evoprune.vision.encoder import encode
from evoprune.vision.layout import geometry
from evoprune.vision.preprocess import patchify
from evoprune.vision.tower import tower_shape
from tests.methods.published import published
from tests.vision.reference import encode_slowly
from tests.vision.tower import random_patches, tiny_tower


def units(grid) -> int:
    return grid[0] * grid[1] * grid[2]


def encode_noise(grid, method, keep, full_layers=(1, 3), seed=0, **how):
    return encode(tiny_tower(full_layers), [random_patches(grid, seed)], grid, method, keep, **how)


def check_books(encoded, grid, block=1):
    """What holds for every result, whatever the method; rows stand for units of one block, of the whole clip if that is None."""
    n = units(grid)
    assert encoded.owner.shape == (n,) and encoded.grids == (grid,)
    assert ((encoded.owner >= 0) & (encoded.owner < len(encoded.rows))).all()
    assert encoded.owner.unique().numel() == len(encoded.rows)  # every row stands for something
    assert (encoded.kept.diff() > 0).all()
    assert encoded.kept.min() >= 0 and encoded.kept.max() < n
    if encoded.counts is None:  # else tokens are means of what they stand for
        assert torch.equal(encoded.features, encoded.rows[encoded.owner[encoded.kept]])
    grid_of = torch.arange(n) // (grid[1] * grid[2])
    for row in range(len(encoded.rows)):
        assert (grid_of[encoded.owner == row] // (block or grid[0])).unique().numel() == 1
    assert sum(encoded.kept_per_grid) == len(encoded.kept) and len(encoded.kept_per_grid) == grid[0]
    assert encoded.kept_per_grid == [int((grid_of[encoded.kept] == g).sum()) for g in range(grid[0])]


def check_layers(encoded, grid, method, keep, full_layers):
    """The rows of each layer are those of the schedule, added up over the blocks."""
    shape = tower_shape(tiny_tower(full_layers))
    geo = geometry(grid[1], grid[2])
    plans = []
    for first in range(0, grid[0], method.block):
        shares = spread(keep, grid[0])[first : first + method.block]
        plans.append(method.rows(shape, len(shares) * geo.units, len(shares) * geo.windows, max(1, sum(shares))))
    left = [sum(column) for column in zip(*plans, strict=True)]
    entered = [units(grid), *left[:-1]]
    assert encoded.layers == list(enumerate(entered))
    assert encoded.live_share == pytest.approx(sum(entered) / shape.depth / units(grid))
    assert len(encoded.rows) == left[-1]


# --- without pruning ---------------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1), (3, 1, 1), (1, 4, 4), (1, 5, 7), (2, 3, 5), (3, 8, 4), (2, 9, 6), (1, 1, 9), (4, 6, 2)]


@pytest.mark.parametrize("grid", SIZES)
@pytest.mark.parametrize("full_layers", [(1, 3), (), (0, 1, 2, 3)])
def test_budget_one_is_hugging_faces_tower(grid, full_layers):
    visual, patches = tiny_tower(full_layers), random_patches(grid)
    with torch.inference_mode():
        theirs = visual(patches, torch.tensor([[grid[0], grid[1] * 2, grid[2] * 2]])).pooler_output
    for method in (Nothing(), published(), Random()):
        ours = encode(visual, [patches], grid, method, units(grid))
        torch.testing.assert_close(ours.features, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert torch.equal(ours.kept, torch.arange(units(grid))) and torch.equal(ours.owner, ours.kept)
        assert ours.live_share == 1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("grid", [(2, 8, 12), (1, 5, 7)])
def test_in_bf16_it_is_as_near_to_float32_as_hugging_faces(grid, packed):
    exact, half, own = (deepcopy(tiny_tower()) for _ in range(3))
    half.bfloat16(), own.bfloat16()
    if packed:
        pack(own)
    patches, thw = random_patches(grid), torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]])
    units = grid[0] * grid[1] * grid[2]
    with torch.inference_mode():
        truth = exact(patches, grid_thw=thw).pooler_output
        theirs = half(patches.bfloat16(), grid_thw=thw).pooler_output.float()
    ours = encode(own, [patches.bfloat16()], grid, Nothing(), units).features.float()
    error, usual = ((x - truth).norm() / truth.norm() for x in (ours, theirs))
    assert 0 < error < 1.3 * usual


def test_a_method_that_prunes_nothing_ignores_the_budget():
    encoded = encode_noise((2, 4, 5), Nothing(), 3)
    assert torch.equal(encoded.kept, torch.arange(40))
    check_books(encoded, (2, 4, 5))


@pytest.mark.parametrize("keep", [1, 2, 7, 39])
def test_a_method_that_acts_after_the_tower_gets_all_rows_and_picks_tokens(keep):
    grid = (2, 4, 5)
    whole = encode_noise(grid, Nothing(), 40)
    encoded = encode_noise(grid, Random(), keep, seed=0)
    assert torch.equal(encoded.rows, whole.rows) and len(encoded.kept) == keep
    assert torch.equal(encoded.features, whole.features[encoded.kept])
    assert encoded.live_share == 1
    check_books(encoded, grid)


# --- chunks and pieces -------------------------------------------------------------------------------------------------


def assert_same(a, b, atol=2e-5):
    assert torch.equal(a.kept, b.kept)
    assert torch.equal(a.owner, b.owner)
    assert a.layers == b.layers
    torch.testing.assert_close(a.rows, b.rows, atol=atol, rtol=1e-5)
    torch.testing.assert_close(a.features, b.features, atol=atol, rtol=1e-5)


CHUNKS = [1, 35, 70, 100, 10**6]


@pytest.mark.parametrize(
    "method",
    [Nothing(), Random(), published(), published(survivor="attended"), published(block=2)],
)
@pytest.mark.parametrize("keep", [3, 40, 100])
def test_the_result_does_not_depend_on_the_chunk_size(method, keep):
    whole, *others = (encode_noise((5, 5, 7), method, keep, chunk_units=size) for size in reversed(CHUNKS))
    for other in others:
        assert_same(other, whole)


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


@pytest.mark.parametrize("scene", ["black", "half plain", "noise"])
@pytest.mark.parametrize(
    ("grid", "keep", "method"),
    [
        ((4, 8, 8), 179, published()),
        ((4, 8, 8), 51, published()),
        ((4, 8, 8), 13, published(survivor="attended")),
        ((3, 6, 9), 16, published(features="hidden", split="checkerboard")),
        ((5, 5, 6), 20, published(block=2, split="checkerboard")),
    ],
)
def test_nor_does_it_where_rows_are_equal_and_ties_decide(scene, grid, keep, method):
    patches = patchify(still_frames(grid, scene))
    whole, *others = (
        encode(tiny_tower(), [patches], grid, method, keep, chunk_units=size)
        for size in (10**6, 1, 2 * grid[1] * grid[2], 3 * grid[1] * grid[2])
    )
    for other in others:
        assert_same(other, whole)


@pytest.mark.parametrize("cuts", [[1], [139], [140, 140], [0, 5, 400], [140, 280, 420, 560], [699], [700]])
@pytest.mark.parametrize("chunk_units", [35, 70])
def test_nor_on_how_the_patches_are_cut_into_pieces(cuts, chunk_units):
    grid, method = (5, 5, 7), published()
    whole = encode_noise(grid, method, 40, chunk_units=chunk_units)
    pieces = random_patches(grid).tensor_split(cuts)
    assert_same(encode(tiny_tower(), iter(pieces), grid, method, 40, chunk_units=chunk_units), whole, atol=0)


@pytest.mark.parametrize(
    "rows",
    [[], [0], [136], [139], [140], [276, 3], [281], [280, 1], [280, 140], [280, 280], [420]],
    ids=str,
)
@pytest.mark.parametrize("chunk_units", [1, 70, 10**6])
def test_patches_that_do_not_add_up_are_refused(rows, chunk_units):
    pieces = [torch.zeros(n, 1176) for n in rows]
    with pytest.raises(ValueError, match="patches"):
        encode(tiny_tower(), pieces, (2, 5, 7), published(), 20, chunk_units=chunk_units)


# --- counts ------------------------------------------------------------------------------------------------------------


@st.composite
def papers(draw):
    first, last = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    return published(
        allocation=draw(st.sampled_from(ALLOCATIONS)),
        first=first,
        last=last,
        critical=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        neighbours=draw(st.integers(1, 5)),
        features=draw(st.sampled_from(["keys", "keys_rotary", "hidden"])),
        split=draw(st.sampled_from(["alternate", "checkerboard"])),
        survivor=draw(st.sampled_from(["destination", "attended"])),
        size_bias=draw(st.booleans()),
        windows=draw(st.booleans()),
        block=draw(st.integers(1, 3)),
    )


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    st.floats(0, 1, exclude_min=True),
    papers(),
    st.sampled_from([(1, 3), (), (0,), (1,), (2,), (0, 1, 2, 3)]),
    st.integers(1, 200),
)
def test_exactly_the_budget_comes_out(grid, budget, method, full_layers, chunk_units):
    keep = keep_count(budget, units(grid))
    encoded = encode_noise(grid, method, keep, full_layers, chunk_units=chunk_units)
    assert len(encoded.kept) == len(encoded.features) == keep
    check_books(encoded, grid, method.block)
    if keep < units(grid):
        check_layers(encoded, grid, method, keep, full_layers)


@pytest.mark.parametrize("keep", range(1, 41, 3))
def test_every_count_can_be_had(keep):
    grid = (2, 4, 5)
    encoded = encode_noise(grid, published(), keep)
    assert len(encoded.kept) == keep
    check_books(encoded, grid)


@pytest.mark.parametrize("scene", ["black", "half plain"])
@pytest.mark.parametrize("keep", [1, 5, 30, 79])
def test_counts_hold_where_all_scores_are_equal(scene, keep):
    grid = (4, 4, 5)
    encoded = encode(tiny_tower(), [patchify(still_frames(grid, scene))], grid, published(), keep)
    assert len(encoded.kept) == keep and encoded.features.isfinite().all()
    check_books(encoded, grid)


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 8])
def test_below_a_token_a_grid_the_whole_clip_is_covered(keep):
    encoded = encode_noise((9, 3, 3), published(), keep)
    assert len(encoded.rows) == 9 and len(encoded.kept) == keep
    for length in range(1, 10):  # every stretch of grids has its share, rounded up or down
        for at in range(10 - length):
            assert abs(sum(encoded.kept_per_grid[at : at + length]) - keep * length / 9) < 1


def test_what_no_merging_can_reach_is_taken_by_size():
    # No layer looks at whole grids: each of the six windows keeps a row, and four of them must go in the end.
    grid = (1, 5, 12)
    encoded = encode_noise(grid, published(), 2, full_layers=())
    assert len(encoded.rows) == 6 and len(encoded.kept) == 2
    sizes = torch.bincount(encoded.owner)
    chosen = sizes[encoded.owner[encoded.kept]]
    assert sizes.tolist() == [16, 16, 16, 4, 4, 4] and chosen.tolist() == [16, 16]


# --- against the slow encoder ------------------------------------------------------------------------------------------


def assert_like_the_slow_one(grid, method, keep, full_layers=(1, 3), seed=0):
    home, owner, tokens = encode_slowly(tiny_tower(full_layers), random_patches(grid, seed), grid, method, keep)
    encoded = encode_noise(grid, method, keep, full_layers, seed)
    assert len(home) == keep  # else the last resort would have to be a part of the reference
    assert encoded.kept.tolist() == home
    assert encoded.owner.tolist() == owner
    torch.testing.assert_close(encoded.features.double(), tokens, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [48, 18, 7])  # of 70
@pytest.mark.parametrize(
    ("features", "split", "survivor"),
    list(product(["keys", "keys_rotary", "hidden"], ["alternate", "checkerboard"], ["destination", "attended"])),
)
def test_against_loops(features, split, survivor, keep):
    assert_like_the_slow_one((2, 5, 7), published(features=features, split=split, survivor=survivor), keep)


@pytest.mark.parametrize(
    "settings_",
    [
        {"size_bias": False},
        {"diversity": 0.0, "attention": 0.0, "critical": 0.0},
        {"diversity": -0.5, "attention": 1.0, "neighbours": 1},
        {"diversity": 1.0, "critical": 0.5, "neighbours": 40},
        {"critical": 1.0},
        {"attention": 0.0, "critical": 0.0, "survivor": "attended"},
    ],
    ids=str,
)
def test_against_loops_with_other_weights(settings_):
    assert_like_the_slow_one((1, 6, 6), published(**settings_), 9)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("full_layers", [(1, 3), (0, 3), (2,)])
def test_against_loops_on_other_schedules(allocation, full_layers):
    # With a grid layer first, rows own units of other windows when a window layer follows.
    assert_like_the_slow_one((2, 4, 6), published(allocation=allocation, first=0, last=0.8), 11, full_layers)
