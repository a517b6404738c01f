"""Rows chosen between the tower's layers, for all layers after them."""

from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evoprune.errors import ModelError
from evoprune.methods.base import Selection
from evoprune.methods.evoprune import EvoPrune
from evoprune.methods.none import Nothing
from evoprune.pruning.select import nearest_chosen
from evoprune.vision import devices
from evoprune.vision.encoder import encode
from evoprune.vision.layout import chosen_layout, geometry, window_order
from tests.vision.clips import changes, clip
from tests.vision.reference import encode_slowly
from tests.vision.test_devices import both_ways
from tests.vision.test_encoder import assert_same, check_books, units
from tests.vision.test_time import encode_clip, scanned
from tests.vision.tower import random_patches, tiny_tower

# --- the layout --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)), st.floats(0, 1), st.integers(0, 99))
def test_chosen_units_are_rows_in_window_order_and_own_what_they_stand_for(grid, share, seed):
    random, n, geo = torch.Generator().manual_seed(seed), units(grid), geometry(*grid[1:])
    keep = max(1, round(share * n))
    kept = torch.randperm(n, generator=random)[:keep].sort().values
    stands = torch.randint(keep, (n,), generator=random)
    stands[kept] = torch.arange(keep)
    layout, order = chosen_layout(geo, grid[0], kept, stands)
    alive = torch.zeros(n, dtype=torch.bool).index_fill_(0, kept, True).view(grid[0], -1)
    assert torch.equal(layout.home, window_order(geo, grid[0], alive)) and torch.equal(layout.home, kept[order])
    assert torch.equal(layout.home[layout.owner], kept[stands])
    assert sum(layout.per_block) == layout.rows == keep


# --- against the slow encoder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("keep", [60, 25, 10, 3, 1])
@pytest.mark.parametrize("full_layers", [(1, 3), (0,), ()])
def test_chosen_rows_against_loops(share, keep, full_layers):
    grid, changed = (7, 3, 5), changes((7, 3, 5), share)
    patches, visual = clip(grid, changed), tiny_tower(full_layers)
    for method in (
        EvoPrune(),
        EvoPrune(depth=0.5, merge=1.0, alpha=1.0),
        EvoPrune(depth=0.75, last=0.75, merge=0.2, block=2),
        EvoPrune(average=False, reuse=0.0),
        EvoPrune(encoder_budget=0.3, count=0.0),
    ):
        new = changed if method.reuse else None
        if method.reuse:
            assert torch.equal(scanned(patches, grid, method), changed)  # else what follows shows something else
        home, owner, tokens = encode_slowly(visual, patches, grid, method, keep, new)
        for size in (1, 30, 10**6):
            made = encode(visual, [patches], grid, method, keep, chunk_units=size)
            assert made.owner.tolist() == owner
            torch.testing.assert_close(made.rows.double(), tokens, atol=1e-4, rtol=1e-4)
            assert len(made.kept) == keep
            if len(home) == keep < len(made.owner) and made.layers[0][1] > keep:
                assert made.kept.tolist() == home and torch.equal(made.features, made.rows)


# --- properties --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
    share_kept=st.floats(0, 1),
    encoder_share=st.sampled_from([None, 0.001, 0.1, 0.3, 0.9]),
    depth=st.sampled_from([0.1, 0.5, 0.75]),
    merge=st.sampled_from([0.2, 0.5, 1.0]),
    chunk_units=st.integers(1, 200),
)
def test_counts_are_exact_and_chunks_leave_no_trace(
    grid, share, seed, share_kept, encoder_share, depth, merge, chunk_units
):
    method = EvoPrune(encoder_budget=encoder_share, depth=depth, last=depth, merge=merge)
    n = units(grid)
    keep = max(1, round(n * share_kept))
    changed = changes(grid, share, seed)
    whole = encode_clip(grid, changed, method, keep, seed, chunk_units=10**6)
    assert_same(encode_clip(grid, changed, method, keep, seed, chunk_units=chunk_units), whole)
    assert len(whole.kept) == len(whole.features) == keep
    check_books(whole, grid, None)
    if keep == n and encoder_share is None:
        assert whole.live_share == 1
        return
    early = max(1, round(depth * 4))
    rows = [count for _, count in whole.layers]
    most = keep if encoder_share is None else max(1, round(encoder_share * n))
    assert rows[0] == changed.sum() and rows[:early] == sorted(rows[:early], reverse=True)
    assert len({*rows[early:]}) <= 1 and len(whole.rows) <= most and all(count <= rows[0] for count in rows)
    assert all(count == len(whole.rows) for count in rows[early:])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_is_chosen_inside_is_what_is_read(share):
    grid, keep = (6, 3, 5), 12
    made = encode_clip(grid, changes(grid, share), EvoPrune(), keep)
    assert torch.equal(made.features, made.rows) and torch.equal(made.owner[made.kept], torch.arange(keep))
    stood_for = torch.bincount(made.owner)
    assert stood_for.sum() == units(grid)
    torch.testing.assert_close(made.counts, stood_for.float().sqrt())


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_with_an_encoder_budget_above_it_is_chosen_from_once_more(share):
    grid, keep = (6, 3, 5), 12
    method = EvoPrune(encoder_budget=0.25, merge=1.0)
    made = encode_clip(grid, changes(grid, share), method, keep)
    assert len(made.rows) == round(0.25 * 90) == made.layers[-1][1]
    seconds = [float(t) for t in range(6)]
    stands = nearest_chosen(made.rows, made.owner, grid, seconds, made.kept, alpha=method.alpha)
    torch.testing.assert_close(made.counts, torch.bincount(stands).float().sqrt())


@pytest.mark.parametrize("grids", [2, 5, 9])
def test_a_clip_in_which_nothing_happens_is_its_first_grid_if_that_is_kept(grids):
    grid, still = (grids, 3, 5), changes((grids, 3, 5), 0.0)
    patches = clip(grid, still)
    picture = encode(tiny_tower(), [patches[: 4 * 15]], (1, 3, 5), Nothing(), 15)
    made = encode(tiny_tower(), [patches], grid, EvoPrune(merge=1.0), 15)
    torch.testing.assert_close(made.rows, picture.rows, atol=2e-5, rtol=1e-5)
    assert made.layers == [(layer, 15) for layer in range(4)] and made.owner.tolist() == list(range(15)) * grids
    assert {rows for _, rows in encode(tiny_tower(), [patches], grid, EvoPrune(merge=1.0), 4).layers} == {15, 4}


def test_what_has_not_changed_sees_what_has_around_it():
    """The same row is shown in two grids, whose other half has changed in between: only what it sees there tells them apart."""
    grid, unit = (2, 4, 4), torch.arange(32)
    changed = torch.ones(2, 16, dtype=torch.bool)
    changed[1, 8:] = False
    kept, before = torch.tensor([0, 15, 16, 31]), []

    class Again(EvoPrune):
        def narrow(self, tokens, keep):
            before.append(tokens.rows[tokens.owner[kept]])
            weight = torch.zeros(32).index_fill_(0, kept, 1.0)
            return Selection(kept, torch.where(unit % 16 < 8, 0, 1) + unit // 16 * 2, weight)

    made = encode(tiny_tower(), [clip(grid, changed, drift=0)], grid, Again(merge=1.0), 4)
    assert torch.equal(before[0][1], before[0][3]) and not torch.equal(before[0][0], before[0][2])
    assert (made.rows[1] - made.rows[3]).norm() > 0.1


def test_a_row_is_seen_by_the_grids_whose_units_it_stands_for():
    """One row of the second grid stands for half of the first one: what the first grid's row becomes depends on it."""
    grid, unit, kept = (2, 4, 4), torch.arange(32), torch.tensor([0, 31])
    made = []
    for stands in (torch.where(unit < 8, 0, 1), unit // 16):

        class Across(EvoPrune):
            def narrow(self, tokens, keep, stands=stands):
                return Selection(kept, stands, torch.zeros(32).index_fill_(0, kept, 1.0))

        patches = clip(grid, changes(grid, 1.0))
        made.append(encode(tiny_tower(), [patches], grid, Across(merge=1.0), 2).rows[0])
    assert (made[0] - made[1]).norm() > 0.1


def test_units_may_be_dropped():
    class Drops(EvoPrune):
        def narrow(self, tokens, keep):
            return Selection(
                torch.tensor([3, 20]), torch.where(torch.arange(32) < 20, -1, 1).index_fill_(0, torch.tensor(3), 0)
            )

    made = encode_clip((2, 4, 4), changes((2, 4, 4), 1.0), Drops(count=0.0), 2)
    assert made.kept.tolist() == [3, 20] and torch.bincount(made.owner[made.owner >= 0]).tolist() == [1, 12]


@pytest.mark.parametrize("encoder_share", [None, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("within", [1e-6, 0.02, 0.2, 9.0])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_auto_stays_between_a_twentieth_and_what_it_may(share, within, encoder_share):
    grid, keep = (10, 4, 6), 120
    made = encode_clip(grid, changes(grid, share), EvoPrune(within=within, encoder_budget=encoder_share), keep)
    assert 12 <= len(made.kept) == len(made.features) <= keep
    check_books(made, grid, None)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_units", [1, 10**6])
def test_on_a_gpu_it_is_the_same(share, chunk_units, kernel, monkeypatch):
    grid = (6, 5, 6)
    patches = clip(grid, changes(grid, share))
    for method in (EvoPrune(), EvoPrune(depth=0.5, encoder_budget=0.3), EvoPrune(reuse=0.0, merge=1.0)):
        both_ways(monkeypatch, grid, method, 20, kernel, (1, 3), chunk_units, patches)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    keep=st.floats(0, 1),
    encoder_share=st.sampled_from([None, 0.1, 0.9]),
    full_layers=st.sampled_from([(1, 3), (), (2,)]),
    kernel=st.booleans(),
)
def test_nor_does_any_clip_tell(monkeypatch, grid, share, keep, encoder_share, full_layers, kernel):
    method, patches = EvoPrune(encoder_budget=encoder_share), clip(grid, changes(grid, share))
    both_ways(monkeypatch, grid, method, max(1, round(units(grid) * keep)), kernel, full_layers, 60, patches)


def test_numbers_that_are_none_are_found_before_anything_is_chosen(monkeypatch):
    patches = random_patches((2, 3, 5))
    patches[7] = float("nan")
    monkeypatch.setattr(EvoPrune, "narrow", lambda *_: pytest.fail("chosen"))
    monkeypatch.setattr(devices, "static_shapes", lambda device: True)  # where chunks are not looked at one by one
    with pytest.raises(ModelError, match="encode"):
        encode(tiny_tower(), [patches], (2, 3, 5), EvoPrune(reuse=0.0), 6)


def test_nor_are_those_that_come_later_passed_on():
    visual = deepcopy(tiny_tower())
    with torch.no_grad():
        visual.blocks[3].norm2.weight[2] = float("nan")
    with pytest.raises(ModelError, match="encode"):
        encode(visual, [random_patches((2, 3, 5))], (2, 3, 5), EvoPrune(reuse=0.0), 6)


def test_who_narrows_may_not_ask_for_what_there_is_after_the_encoder():
    class Asks(EvoPrune):
        needs_after = frozenset({"keys"})

    with pytest.raises(TypeError, match="narrows"):
        encode(tiny_tower(), [random_patches((2, 3, 5))], (2, 3, 5), Asks(), 6)
