"""Blocks of several grids, and references in time."""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.methods.evoprune import EvoPrune
from evoprune.methods.none import Nothing
from evoprune.model.linear import pack
from evoprune.pruning.reference import scan, turns
from evoprune.pruning.select import choose_units, nearest_chosen
from evoprune.vision import encoder
from evoprune.vision.encoder import encode
from evoprune.vision.preprocess import patch_means
from tests.methods.published import late, published
from tests.vision.clips import changes, clip
from tests.vision.reference import encode_slowly
from tests.vision.test_encoder import assert_same, check_books, units
from tests.vision.tower import random_patches, tiny_tower


def encode_clip(grid, changed, method, keep, seed=0, **how):
    return encode(tiny_tower(), [clip(grid, changed, seed)], grid, method, keep, **how)


def encoded(changed, method):
    """Which units are encoded anew: what has changed, and whose turn it is where anything has."""
    if not method.refresh:
        return changed
    turn = turns(changed.shape[1], method.refresh) == torch.arange(len(changed))[:, None] % method.refresh
    return changed | (turn & changed.any(1, keepdim=True))


# --- against the slow encoder ------------------------------------------------------------------------------------------


def assert_like_the_slow_one(patches, grid, method, keep, full_layers=(1, 3), changed=None, chunk_units=(10**6,)):
    home, owner, tokens = encode_slowly(tiny_tower(full_layers), patches, grid, method, keep, changed)
    for size in chunk_units:
        encoded = encode(tiny_tower(full_layers), [patches], grid, method, keep, chunk_units=size)
        assert encoded.owner.tolist() == owner
        torch.testing.assert_close(encoded.rows.double(), tokens, atol=1e-4, rtol=1e-4)
        assert len(encoded.kept) == keep
        if not method.selects:
            assert torch.equal(encoded.features, encoded.rows[encoded.owner[encoded.kept]])
            assert len(home) == keep and encoded.kept.tolist() == home
    return encoded


@pytest.mark.parametrize("keep", [60, 26, 5])
@pytest.mark.parametrize(
    ("block", "split", "survivor"),
    list(product([2, 3], ["alternate", "checkerboard"], ["destination", "attended"])),
)
def test_blocks_against_loops(block, split, survivor, keep):
    grid, method = (5, 3, 5), published(block=block, split=split, survivor=survivor, first=0.0, last=0.8)
    assert_like_the_slow_one(random_patches(grid), grid, method, keep, chunk_units=(1, 45, 10**6))


@pytest.mark.parametrize("full_layers", [(1, 3), (0,), ()])
@pytest.mark.parametrize("block", [1, 2])
def test_blocks_against_loops_where_windows_mean_nothing(full_layers, block):
    grid = (3, 5, 6)
    method = published(block=block, windows=False, allocation="mean", first=0.0)
    assert_like_the_slow_one(random_patches(grid), grid, method, 23, full_layers, chunk_units=(1, 10**6))


def scanned(patches, grid, method):
    return scan(patch_means(patches, grid[1] * grid[2]), threshold=method.reuse, refresh=method.refresh)[0].encoded


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize(("encoder", "refresh"), [(0.12, 0), (0.4, 3), (1.0, 0), (1.0, 2)])
def test_references_against_loops(share, block, encoder, refresh):
    grid, changed = (7, 3, 5), changes((7, 3, 5), share)
    patches = clip(grid, changed)
    method = late(block=block, encoder_budget=encoder, first=0.0, last=0.6, refresh=refresh)
    changed = encoded(changed, method)
    assert torch.equal(scanned(patches, grid, method), changed)  # else what follows shows something else
    assert_like_the_slow_one(patches, grid, method, 12, changed=changed, chunk_units=(1, 30, 60, 10**6))


@pytest.mark.parametrize(
    "settings_",
    [
        {"split": "alternate", "features": "hidden"},
        {"features": "keys_rotary", "attention": 0.3, "critical": 0.2},
        {"survivor": "attended", "block": 2},
        {"diversity": 0.3, "attention": 0.3, "critical": 0.1, "survivor": "attended", "block": 1},
        {"windows": False, "block": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("full_layers", [(1, 3), (0, 2)])
def test_references_against_loops_with_other_settings(settings_, full_layers):
    grid, changed = (6, 5, 6), changes((6, 5, 6), 0.3, seed=2)
    method = replace(late(block=3, encoder_budget=0.15, first=0.0, last=0.6), **settings_)
    assert_like_the_slow_one(
        clip(grid, changed), grid, method, 12, full_layers, changed=encoded(changed, method), chunk_units=(1, 60, 10**6)
    )


# --- properties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [late(encoder_budget=0.2, reuse=0.0), EvoPrune(reuse=0.0)])
def test_a_threshold_of_zero_is_no_references(method):
    grid = (6, 3, 5)
    still, moving = changes(grid, 0.0), changes(grid, 1.0)
    assert encode_clip(grid, still, method, 9).layers[0][1] == units(grid)
    # Any other threshold gives the same where everything changes by more than it, from cut to cut.
    for threshold in (1e-6, 5.0):
        for size in (1, 10**6):
            other = encode_clip(grid, moving, replace(method, reuse=threshold), 9, chunk_units=size)
            assert_same(other, encode_clip(grid, moving, method, 9, chunk_units=size))


@pytest.mark.parametrize("chunk_units", [1, 60, 10**6])
@pytest.mark.parametrize("grids", [2, 4, 5, 9])
def test_a_clip_in_which_nothing_happens_is_its_first_grid(grids, chunk_units):
    grid, alone = (grids, 5, 6), (1, 5, 6)
    still = changes(grid, 0.0)
    patches = clip(grid, still)
    first = min(4, grids)  # grids of the first block
    for encoder_share in (0.1, 1.0):
        method = late(encoder_budget=encoder_share)
        made = encode(tiny_tower(), [patches], grid, method, 7, chunk_units=chunk_units)
        # The encoder's share is of a block's units, changed or not.
        own = replace(method, encoder_budget=min(1.0, first * encoder_share))
        picture = encode(tiny_tower(), [patches[: 4 * 30]], alone, own, 7)
        torch.testing.assert_close(made.rows, picture.rows, atol=2e-5, rtol=1e-5)
        assert torch.equal(made.owner.view(grids, 30), picture.owner.expand(grids, 30))
        assert made.layers == picture.layers
        assert made.live_share == pytest.approx(picture.live_share / grids)
        check_books(made, grid, None)
    # Nothing merged: every unit has the row of its place, which is what the tower makes of the grid.
    assert made.owner.tolist() == list(range(30)) * grids
    whole = encode(tiny_tower(), [patches[: 4 * 30]], alone, Nothing(), 30)
    torch.testing.assert_close(made.rows, whole.rows, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [late(block=1, encoder_budget=0.2), late(block=4, encoder_budget=0.2), EvoPrune()])
def test_a_clip_of_cuts_costs_what_it_costs_without_references(method):
    grid = (9, 5, 6)
    cuts = encode_clip(grid, changes(grid, 1.0), method, 20)
    assert cuts.layers == encode_clip(grid, changes(grid, 1.0), replace(method, reuse=0.0), 20).layers
    assert cuts.layers[0][1] == units(grid)


def test_what_changed_is_a_row_and_what_did_not_has_the_last_that_did():
    grid, changed = (7, 3, 5), changes((7, 3, 5), 0.3)
    made = encode_clip(grid, changed, late(encoder_budget=1.0, refresh=0), 9, chunk_units=30)
    number = (changed.flatten().cumsum(0) - 1).view(7, 15)
    last = torch.where(changed, torch.arange(7)[:, None], 0).cummax(0).values
    assert torch.equal(made.owner.view(7, 15), number[last, torch.arange(15)])
    assert made.layers[0][1] == changed.sum() == len(made.rows)


@settings(deadline=None, max_examples=60)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
    block=st.integers(1, 4),
    share_kept=st.floats(0, 1),
    encoder_share=st.sampled_from([0.001, 0.1, 0.3, 1.0]),
    attention=st.sampled_from([0.0, 0.3]),
    windows=st.booleans(),
    chunk_units=st.integers(1, 200),
)
def test_the_result_does_not_depend_on_the_chunk_size(
    grid, share, seed, block, share_kept, encoder_share, attention, windows, chunk_units
):
    method = late(
        block=block,
        encoder_budget=encoder_share,
        first=0.0,
        last=0.8,
        attention=attention,
        windows=windows,
    )
    keep = max(1, round(units(grid) * share_kept))
    changed = changes(grid, share, seed)
    whole = encode_clip(grid, changed, method, keep, seed, chunk_units=10**6)
    assert_same(encode_clip(grid, changed, method, keep, seed, chunk_units=chunk_units), whole)
    assert len(whole.kept) == len(whole.features) == keep
    check_books(whole, grid, None)
    blocks = [min(block, grid[0] - first) * grid[1] * grid[2] for first in range(0, grid[0], block)]
    assert len(whole.rows) <= sum(max(1, round(encoder_share * n)) for n in blocks)


@pytest.mark.parametrize(
    "settings_", [{}, {"encoder_budget": 0.001}, {"reuse": 0.0}, {"block": 1, "alpha": 0.0}], ids=str
)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_every_count_can_be_had(share, settings_):
    grid = (4, 2, 3)
    changed, method = changes(grid, share), late(**settings_)
    for keep in range(1, units(grid) + 1):
        made = encode_clip(grid, changed, method, keep)
        assert len(made.kept) == keep
        check_books(made, grid, None)


def test_the_choice_is_made_among_all_units_at_their_times():
    grid = (6, 3, 5)
    made = encode_clip(grid, changes(grid, 0.2), late(alpha=2.0), 20, seconds_per_grid=0.4)
    seconds = [0.0, 0.4, 0.8, 1.2, 1.6, 2.0]
    assert torch.equal(made.kept, choose_units(made.rows, made.owner, grid, seconds, 20, alpha=2.0))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("count", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_token_is_what_it_stands_for_and_counts_for_it(average, count, share):
    grid, keep = (6, 3, 5), 20
    made = encode_clip(grid, changes(grid, share), late(alpha=2.0, average=average, count=count), keep)
    seconds = [float(t) for t in range(6)]
    stands = nearest_chosen(made.rows, made.owner, grid, seconds, made.kept, alpha=2.0)
    groups = [made.rows[made.owner[stands == k]] for k in range(keep)]
    assert sum(len(group) for group in groups) == 90 and (stands[made.kept] == torch.arange(keep)).all()
    tokens = torch.stack([group.mean(0) for group in groups]) if average else made.rows[made.owner[made.kept]]
    torch.testing.assert_close(made.features, tokens, atol=1e-5, rtol=1e-5)
    if count:
        torch.testing.assert_close(made.counts, torch.tensor([float(len(group)) for group in groups]) ** count)
    else:
        assert made.counts is None


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_where_all_is_read_each_token_counts_once(share):
    made = encode_clip((5, 3, 5), changes((5, 3, 5), share), late(encoder_budget=0.3), 75)
    assert made.counts is None and torch.equal(made.features, made.rows[made.owner])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_with_all_tokens_it_is_hugging_faces_tower(share):
    grid = (5, 5, 6)
    patches = clip(grid, changes(grid, share))
    with torch.inference_mode():
        theirs = tiny_tower()(patches, torch.tensor([[5, 10, 12]])).pooler_output
    for method in (EvoPrune(), published(block=2)):
        ours = encode(tiny_tower(), [patches], grid, method, 150, chunk_units=60)
        torch.testing.assert_close(ours.features, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert torch.equal(ours.kept, torch.arange(150)) and ours.live_share == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_with_all_tokens_rows_are_saved_only_on_request(share):
    grid = (5, 5, 6)
    changed = changes(grid, share)
    method = late(encoder_budget=1.0)
    made = encode_clip(grid, changed, method, 150)
    assert torch.equal(made.kept, torch.arange(150)) and len(made.rows) == encoded(changed, method).sum()
    assert torch.equal(made.features, made.rows[made.owner])
    assert_like_the_slow_one(clip(grid, changed), grid, late(encoder_budget=0.2), 150, changed=encoded(changed, method))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_may_have_nothing_new(dtype, packed):
    visual, grid = deepcopy(tiny_tower()).to(dtype), (6, 5, 6)
    if packed:
        pack(visual)
    changed = torch.zeros(6, 30, dtype=torch.bool)
    changed[0] = changed[3, :4] = True  # the other grids have no rows at all; in the fourth new rows see old ones
    patches = clip(grid, changed, drift=0).to(dtype)
    method = late(block=1, encoder_budget=1.0, refresh=0)
    whole, cut = (encode(visual, [patches], grid, method, 9, chunk_units=size) for size in (10**6, 1))
    assert cut.layers == whole.layers and cut.layers[0][1] == 34
    assert torch.equal(cut.owner, whole.owner) and len(cut.kept) == 9
    assert cut.rows.dtype == dtype
    error = (cut.rows.float() - whole.rows.float()).norm() / whole.rows.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_what_is_carried_does_not_grow(monkeypatch):
    kept, held = [], []

    class Watched(encoder.Past):
        def __init__(self):
            super().__init__()
            kept.append(self)

    def measure(*args, **how):
        result = run(*args, **how)
        (past,) = kept
        if past.seen is None:  # nothing follows
            return result
        held.append((sum(x.untyped_storage().nbytes() for x in past.seen), past.row is None or len(past.row)))
        return result

    run = encoder.run_layers
    monkeypatch.setattr(encoder, "Past", Watched)
    monkeypatch.setattr(encoder, "run_layers", measure)
    grid = (24, 3, 5)
    encode_clip(grid, changes(grid, 0.1), late(block=2, encoder_budget=0.2, first=0.0), 30, chunk_units=1)
    per_place = 4 * (2 * 4 * 32 * 4)  # keys and values of four patches in four layers
    assert len(held) == 11 and {size for size, _ in held} == {15 * per_place}
    assert {rows for _, rows in held[1:]} == {15}
