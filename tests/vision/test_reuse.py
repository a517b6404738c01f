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
from evoprune.vision.encoder import NothingNew, Segment, encode_rows, select_tokens
from evoprune.vision.preprocess import patch_means, scan
from evoprune.vision.tower import tower_shape
from tests.methods.tokens import plan_of
from tests.vision.clips import changes, clip
from tests.vision.reference import encode_slowly
from tests.vision.results import assert_same, check_result, encode_clip, encode_patches
from tests.vision.tower import QWEN3_WIDTH, tiny_qwen3, tiny_tower

AFTER = EvoPrune(depth=1.0)  # the selection comes after the tower


def encoded_units(patches, grid, threshold=THRESHOLD) -> torch.Tensor:
    """bool `[T, H*W]`: which units are encoded."""
    source, _ = scan(patch_means(patches, grid[1] * grid[2]), threshold=threshold)
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


# Segments of a longer video: what has not changed is not encoded again, and the result is that of the whole.

PLACES = 5, 6


def in_segments(visual, patches, method, pairs, budget, **how):
    """The segments of a video, each of so many frame pairs (`pairs`), with K tokens or this share of its units."""
    segment, made = Segment(), []
    for piece, count in zip(patches.split([4 * prod(PLACES) * n for n in pairs]), pairs, strict=True):
        grid = (count, *PLACES)
        plan = plan_of(method, tower_shape(visual), grid, max(1, round(budget * prod(grid))))
        made.append((encode_rows(visual, [piece], plan, segment=segment, **how), segment.left))
        segment = Segment(segment.left)
    return made


@pytest.mark.parametrize("chunk_units", [1, 60, 10**6])
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("tower", [tiny_tower, tiny_qwen3])
def test_without_selections_between_layers_segments_are_the_whole(tower, share, chunk_units):
    visual, grid, pairs = tower(), (9, *PLACES), (3, 1, 3, 2)
    changed = changes(grid, share)
    patches = clip(grid, changed, width=QWEN3_WIDTH if tower is tiny_qwen3 else 1176)
    method = methods.parse("evoprune:depth=1:first=0")
    ((whole, _),) = in_segments(visual, patches, method, (9,), 1 / 3)  # a plan with another count has the same rows
    parts = [rows for rows, _ in in_segments(visual, patches, method, pairs, 1 / 3, chunk_units=chunk_units)]
    for values in (lambda rows: rows.tokens.rows, lambda rows: rows.rows.deepstack):
        of_units = torch.cat([values(part)[part.tokens.owner] for part in parts])
        torch.testing.assert_close(of_units, values(whole)[whole.tokens.owner], atol=2e-5, rtol=1e-5)
    assert sum(part.layers[0][1] for part in parts) == whole.layers[0][1] == changed.sum()
    assert all(len(select_tokens(part).kept) == round(prod(part.plan.grid) / 3) for part in parts)


@pytest.mark.parametrize("name", ["evoprune", "evoprune:first=0", "evoprune:first=0.2:rows=0.4:depth=0.5"])
def test_selections_between_layers_see_rows_of_their_own_segment_alone(name):
    visual, grid, pairs = tiny_tower(), (9, *PLACES), (3, 3, 3)
    patches = clip(grid, changes(grid, 0.3))
    method = methods.parse(name)
    parts, cut = (in_segments(visual, patches, method, pairs, 0.4, chunk_units=size) for size in (10**6, 1))
    for number, ((part, _), (other, _)) in enumerate(zip(parts, cut, strict=True)):
        torch.testing.assert_close(part.tokens.rows, other.tokens.rows, atol=2e-5, rtol=1e-5)
        assert torch.equal(part.tokens.owner, other.tokens.owner) and part.layers == other.layers
        owner, computed = part.tokens.owner, part.layers[-1][1]
        assert (owner >= 0).all() and owner.unique().numel() == len(part.rows.unit) >= computed
        assert (part.rows.unit.diff() > 0).all() and torch.equal(
            owner[part.rows.unit], torch.arange(len(part.rows.unit))
        )
        tokens = select_tokens(part)
        assert len(tokens.kept) == 36 and tokens.features.isfinite().all()
        if number:
            before, place = parts[number - 1][1].features, part.rows.unit % prod(PLACES)
            taken = torch.tensor(
                [bool((row == of).all()) for row, of in zip(part.tokens.rows, before[place], strict=True)]
            )
            assert taken.sum() == len(part.rows.unit) - computed > 0


def test_attention_sees_the_rows_of_the_segment_before():
    visual, grid = tiny_tower(), (4, *PLACES)
    changed = changes(grid, 0.1)
    patches = clip(grid, changed)
    other = patches.clone()
    other[: 4 * prod(PLACES)] += 0.5 * torch.randn(4 * prod(PLACES), 1176, generator=torch.Generator().manual_seed(1))
    made = [in_segments(visual, each, methods.parse("evoprune"), (2, 2), 0.5)[1][0] for each in (patches, other)]
    own = [part.tokens.rows[part.tokens.owner[changed[2:].flatten()]] for part in made]
    assert not torch.allclose(own[0], own[1], atol=1e-3)


def test_a_segment_without_anything_new_is_refused():
    patches = clip((4, *PLACES), changes((4, *PLACES), 0.0))
    with pytest.raises(NothingNew):
        in_segments(tiny_tower(), patches, methods.parse("evoprune"), (2, 2), 0.5)


@pytest.mark.parametrize("name", ["tome", "evoprune-paper", "divprune", "reuse+vispruner", "evoprune:reuse=0", "none"])
def test_what_needs_more_than_rows_leaves_nothing(name):
    patches = clip((4, *PLACES), changes((4, *PLACES), 0.3))
    visual, method = tiny_tower(), methods.parse(name)
    parts = in_segments(visual, patches, method, (2, 2), 0.5)
    plan = plan_of(method, tower_shape(visual), (2, *PLACES), 30)
    alone = encode_rows(visual, [patches[len(patches) // 2 :]], plan)
    assert parts[0][1] is None and torch.equal(parts[1][0].tokens.rows, alone.tokens.rows)
