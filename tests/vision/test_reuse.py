"""Reuse in time: a unit that has not changed is represented by the row that was last encoded at its place."""

from copy import deepcopy
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.cpu.linear import pack
from evoprune.methods.baselines import Nothing
from evoprune.methods.evoprune import THRESHOLD, EvoPrune
from evoprune.methods.select import assign_clusters, farthest_points, points_of
from evoprune.vision import encoder
from evoprune.vision.preprocess import Patches, patch_means, scan
from tests.vision.clips import changes, clip
from tests.vision.reference import encode_slowly
from tests.vision.results import assert_same, check_result, encode_clip, encode_patches
from tests.vision.tower import tiny_tower

AFTER = EvoPrune(depth=1.0)  # the selection comes after the tower


def encoded_units(patches, grid, threshold=THRESHOLD) -> torch.Tensor:
    """bool `[T, H*W]`: which units are encoded."""
    source, _ = scan(patch_means(Patches(patches), grid[1] * grid[2]), threshold=threshold)
    return source == torch.arange(grid[0])[:, None]


def points(encoded, grid, alpha=EvoPrune.alpha):
    return points_of(encoded.rows, encoded.owner, grid, alpha)


# --- against the slow encoder ------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("full_layers", [(1, 3), (0, 2), ()])
def test_reused_rows_against_loops(share, full_layers):
    grid, changed = (7, 3, 5), changes((7, 3, 5), share)
    patches, visual = clip(grid, changed), tiny_tower(full_layers)
    assert torch.equal(encoded_units(patches, grid), changed)  # else the test shows something else
    _, owner, tokens = encode_slowly(visual, patches, grid, AFTER, 12, changed)
    for size in (1, 30, 60, 10**6):
        made = encode_patches(patches, grid, AFTER, 12, visual, chunk_units=size)
        assert made.owner.tolist() == owner and len(made.kept) == 12
        torch.testing.assert_close(made.rows.double(), tokens, atol=1e-4, rtol=1e-4)


# --- properties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [EvoPrune(), AFTER], ids=["inside", "after"])
def test_a_threshold_of_zero_is_no_reuse(method):
    grid, method = (6, 3, 5), replace(method, first=0.0)
    none = replace(method, reuse=0.0)
    assert encode_clip(grid, changes(grid, 0.0), none, 9).layers[0][1] == prod(grid)
    # Any other threshold gives the same where everything changes by more than it.
    moving = changes(grid, 1.0)
    for threshold in (1e-6, 5.0):
        for size in (1, 10**6):
            other = encode_clip(grid, moving, replace(method, reuse=threshold), 9, chunk_units=size)
            assert_same(other, encode_clip(grid, moving, none, 9, chunk_units=size))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_at_budget_one_nothing_is_reused(share):
    grid = (5, 5, 6)
    patches = clip(grid, changes(grid, share))
    with torch.inference_mode():
        theirs = tiny_tower()(patches, torch.tensor([[5, 10, 12]])).pooler_output
    for method in (EvoPrune(), methods.parse("reuse+divprune")):
        ours = encode_patches(patches, grid, method, 150, chunk_units=60)
        torch.testing.assert_close(ours.features, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert torch.equal(ours.kept, torch.arange(150)) and ours.live_share == 1


@pytest.mark.parametrize("chunk_units", [1, 60, 10**6])
@pytest.mark.parametrize("pairs", [2, 9])
def test_the_rows_of_a_still_clip_are_those_of_its_first_frame_pair(pairs, chunk_units):
    grid = (pairs, 5, 6)
    patches = clip(grid, changes(grid, 0.0))
    made = encode_patches(patches, grid, AFTER, 7, chunk_units=chunk_units)
    alone = encode_patches(patches[: 4 * 30], (1, 5, 6), Nothing(), 30)
    torch.testing.assert_close(made.rows, alone.rows, atol=2e-5, rtol=1e-5)
    assert made.owner.tolist() == list(range(30)) * pairs and made.layers == alone.layers
    assert made.live_share == pytest.approx(1 / pairs) and len(made.kept) == 7
    check_result(made, grid, whole_clip=True)


def test_a_changed_unit_is_a_row_and_the_others_have_the_last_that_changed():
    grid, changed = (7, 3, 5), changes((7, 3, 5), 0.3)
    made = encode_clip(grid, changed, AFTER, 9, chunk_units=30)
    number = (changed.flatten().cumsum(0) - 1).view(7, 15)
    last = torch.where(changed, torch.arange(7)[:, None], 0).cummax(0).values
    assert torch.equal(made.owner.view(7, 15), number[last, torch.arange(15)])
    assert made.layers[0][1] == changed.sum() == len(made.rows)


@settings(deadline=None, max_examples=50)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
    share_kept=st.floats(0, 1),
    name=st.sampled_from(["evoprune:depth=1", "reuse+divprune", "reuse+visionzip"]),
    chunk_units=st.integers(1, 200),
)
def test_the_result_does_not_depend_on_the_chunk_size(grid, share, seed, share_kept, name, chunk_units):
    method, changed = methods.parse(name), changes(grid, share, seed)
    keep = max(1, round(prod(grid) * share_kept))
    whole = encode_clip(grid, changed, method, keep, seed, chunk_units=10**6)
    assert_same(encode_clip(grid, changed, method, keep, seed, chunk_units=chunk_units), whole)
    assert len(whole.kept) == len(whole.features) == keep
    if name != "reuse+visionzip":  # whose tokens are means although they count once
        check_result(whole, grid, whole_clip=True)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "method", [EvoPrune(), EvoPrune(reuse=0.0, alpha=0.0), AFTER], ids=["inside", "no reuse", "after"]
)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_every_count_can_be_had(share, method):
    grid = (4, 2, 3)
    for keep in range(1, prod(grid) + 1):
        made = encode_clip(grid, changes(grid, share), method, keep)
        assert len(made.kept) == keep
        check_result(made, grid, whole_clip=True)


def test_units_are_selected_among_all_at_their_times():
    grid = (6, 3, 5)
    made = encode_clip(grid, changes(grid, 0.2), replace(AFTER, alpha=2.0), 20)
    assert torch.equal(made.kept, farthest_points(points(made, grid, alpha=2.0), 20))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("count", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_token_is_the_mean_of_its_cluster_and_counts_by_its_size(average, count, share):
    grid, keep = (6, 3, 5), 20
    made = encode_clip(grid, changes(grid, share), replace(AFTER, average=average, count=count), keep)
    owner = assign_clusters(points(made, grid), made.kept)
    clusters = [made.rows[made.owner[owner == k]] for k in range(keep)]
    assert sum(map(len, clusters)) == 90 and torch.equal(owner[made.kept], torch.arange(keep))
    tokens = torch.stack([rows.mean(0) for rows in clusters]) if average else made.rows[made.owner[made.kept]]
    torch.testing.assert_close(made.features, tokens, atol=1e-5, rtol=1e-5)
    if count:
        torch.testing.assert_close(made.size, torch.tensor([float(len(rows)) for rows in clusters]) ** count)
    else:
        assert made.size is None


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_may_have_nothing_new(dtype, packed):
    visual, grid = deepcopy(tiny_tower()).to(dtype), (6, 5, 6)
    if packed:
        pack(visual)
    changed = torch.zeros(6, 30, dtype=torch.bool)
    changed[0] = changed[3, :4] = True  # the others have no rows at all; in the fourth new rows see old ones
    patches = clip(grid, changed, drift=0).to(dtype)
    whole, cut = (encode_patches(patches, grid, AFTER, 9, visual, chunk_units=size) for size in (10**6, 1))
    assert cut.layers == whole.layers and cut.layers[0][1] == 34
    assert torch.equal(cut.owner, whole.owner) and len(cut.kept) == 9
    assert cut.rows.dtype == dtype
    error = (cut.rows.float() - whole.rows.float()).norm() / whole.rows.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_what_is_carried_to_the_next_chunk_does_not_grow(monkeypatch):
    held, run_layers = [], encoder.run_layers

    def measured(run, *args):
        result = run_layers(run, *args)
        kept = run.carried.keys_values.values()
        held.append(sum(x.untyped_storage().nbytes() for x in kept))
        return result

    monkeypatch.setattr(encoder, "run_layers", measured)
    grid, changed = (24, 3, 5), changes((24, 3, 5), 0.1)
    changed[-1] = True
    encode_clip(grid, changed, AFTER, 30, chunk_units=1)
    per_place = 4 * (2 * 4 * 32 * 4)  # keys and values of four patches in four layers
    assert len(held) > 10 and {*held[:-1]} == {15 * per_place} and held[-1] == 0  # nothing follows the last chunk
