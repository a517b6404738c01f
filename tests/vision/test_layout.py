"""Rows, owners and attention groups, against loops over units."""

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_window_index

from evoprune.methods import Selection
from evoprune.vision.attention import groups_by_length
from evoprune.vision.layout import geometry, window_order
from evoprune.vision.rows import Rows, all_units
from tests.vision.tower import groups_by_hand, merge_at_random, numbered, place_key, random_rows, referring

SCOPES = ("window", "pair")
shapes = st.tuples(st.integers(1, 3), st.integers(1, 10), st.integers(1, 10))


def groups_as_made(rows: Rows, scope: str) -> list[tuple[list[int], dict[int, int]]]:
    """Convert the result of `groups_by_length` to the form of `groups_by_hand`."""
    every, groups = torch.arange(len(rows)), []
    for batch in groups_by_length(replace(rows, size_bias=True), scope):
        query = every.view(batch.shape) if batch.query is None else batch.query
        inside = torch.ones_like(query, dtype=torch.bool) if batch.inside is None else batch.inside
        keys = query if batch.key is None else batch.key
        for asking, valid, key, weight in zip(query, inside, keys, batch.weight, strict=True):
            counts = dict(zip(key[weight > 0].tolist(), weight[weight > 0].tolist(), strict=True))
            assert len(counts) == (weight > 0).sum()
            groups.append((asking[valid].tolist(), counts))
    return sorted(groups, key=lambda group: group[0])


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5), (4, 6), (5, 7), (8, 8), (9, 4), (13, 2), (1, 17)])
@pytest.mark.parametrize("pairs", [1, 3])
def test_window_order_is_hugging_faces(size, pairs):
    index, ends = get_vision_window_index(
        torch.tensor([[pairs, size[0] * 2, size[1] * 2]]), spatial_merge_size=2, window_size=112, patch_size=14
    )
    rows = numbered(geometry(*size), pairs)
    assert torch.equal(rows.unit, index)
    windows = rows.lengths("window")
    assert (windows * 4).tolist() == ends.diff().tolist()
    assert geometry(*size).windows * pairs == len(windows)


@pytest.mark.parametrize("scope", SCOPES)
def test_dropped_units_have_no_key(scope):
    rows = random_rows(geometry(5, 6), 2, ["window", "pair"], seed=3)
    owner = rows.unit_to_row.clone()
    lost = [u for u in range(0, len(owner), 3) if u not in rows.unit.tolist()]
    assert lost
    owner[lost] = -1
    rows = replace(rows, unit_to_row=owner)
    assert groups_as_made(rows, scope) == groups_by_hand(rows, scope)
    assert rows.size.sum() == len(owner) - len(lost)
    merged = merge_at_random(rows, "pair", 1)
    assert (merged.unit_to_row[lost] == -1).all() and (merged.unit_to_row >= 0).sum() == len(owner) - len(lost)


@pytest.mark.parametrize(
    ("scopes", "scope", "plain"),
    [
        ([], "window", True),
        (["window"], "window", True),
        (["window", "window"], "pair", True),
        (["window", "pair"], "pair", True),
        (["pair", "window"], "window", False),
    ],
)
def test_groups_are_plain_as_long_as_no_row_left_its_group(scopes, scope, plain):
    batches = groups_by_length(random_rows(geometry(6, 9), 2, scopes, seed=1), scope)
    assert all((batch.key is None) == plain for batch in batches)


@st.composite
def sources(draw):
    """Draw a random `source` `[T, H*W]`, the frame pair of each unit's row (negative for earlier chunks), and the geometry."""
    pairs, height, width = draw(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    changed = torch.rand(pairs, height * width, generator=random) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    last = -torch.randint(1, 4, (height * width,), generator=random)
    if not draw(st.booleans()):
        changed[0] = True
    source = torch.empty(pairs, height * width, dtype=torch.int64)
    for pair in range(pairs):
        last = source[pair] = torch.where(changed[pair], pair, last)
    return source, geometry(height, width)


@settings(deadline=None, max_examples=80)
@given(sources())
def test_references_against_loops(made):
    source, geo = made
    rows = referring(geo, source)
    encoded = [t * geo.units + p for t, places in enumerate(source.tolist()) for p, at in enumerate(places) if at == t]
    order = sorted(encoded, key=lambda unit: place_key(geo, unit))
    assert rows.unit.tolist() == order and len(rows) == len(order)
    for unit, row in enumerate(rows.unit_to_row.tolist()):
        pair, place = divmod(unit, geo.units)
        at = int(source[pair, place])
        assert row == (order.index(at * geo.units + place) if at >= 0 else len(order) + place)
    assert list(rows.counts) == [sum(unit // geo.units == pair for unit in order) for pair in range(len(source))]
    assert rows.counts == rows.per_pair and rows.pairs == len(source)
    assert rows.reach == ("place" if len(order) == source.numel() else "clip")
    if rows.reach == "place":
        full = numbered(geo, len(source))
        assert torch.equal(rows.unit, full.unit) and torch.equal(rows.unit_to_row, full.unit_to_row)


@settings(deadline=None, max_examples=100)
@given(sources(), st.sampled_from(SCOPES))
def test_groups_see_rows_of_earlier_frame_pairs(made, scope):
    source, geo = made
    rows = referring(geo, source)
    pair_of_row = (rows.unit // geo.units).tolist() + [-1] * geo.units
    by_hand = groups_by_hand(rows, scope)
    assert groups_as_made(rows, scope) == by_hand
    assert rows.pair_of_row.tolist() == pair_of_row
    for batch in groups_by_length(rows, scope) if rows.reach != "place" else ():
        assert (batch.key < len(rows) + geo.units).all()


@settings(deadline=None, max_examples=60)
@given(shapes, st.floats(0, 1), st.integers(0, 99))
def test_selected_units_are_rows_in_window_order_and_own_their_clusters(grid, share, seed):
    random, n, geo = torch.Generator().manual_seed(seed), prod(grid), geometry(*grid[1:])
    keep = max(1, round(share * n))
    kept = torch.randperm(n, generator=random)[:keep].sort().values
    owner = torch.randint(keep, (n,), generator=random)
    owner[kept] = torch.arange(keep)
    units = window_order(geo, grid[0])
    made = all_units(units[:, None], units[:, None, None], geo, grid[0]).take(
        Selection(kept, owner, averages=False), owner
    )
    alive = torch.zeros(n, dtype=torch.bool).index_fill_(0, kept, True).view(grid[0], -1)
    assert torch.equal(made.unit, window_order(geo, grid[0], alive, keep)) and torch.equal(made.unit, made.values[:, 0])
    assert torch.equal(made.unit[made.unit_to_row], kept[owner]) and torch.equal(made.unit, made.deepstack[:, 0, 0])
    assert sum(made.per_pair) == len(made) == keep
    back = made.by_unit()
    assert torch.equal(back.unit, kept) and torch.equal(back.unit, back.values[:, 0])
    assert torch.equal(back.unit_to_row, owner)
