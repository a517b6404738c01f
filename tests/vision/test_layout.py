"""Rows, owners and attention groups, against loops over units."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_window_index

from evoprune.methods.types import Selection
from evoprune.vision.layout import (
    TokenLayout,
    attention_groups,
    full_layout,
    geometry,
    order_tables,
    window_order,
)
from evoprune.vision.rows import Rows
from tests.vision.tower import groups_by_hand, merge_at_random, place_key, random_layout, referring

SCOPES = ("window", "pair")
shapes = st.tuples(st.integers(1, 3), st.integers(1, 10), st.integers(1, 10))


def groups_as_made(layout: TokenLayout, scope: str) -> list[tuple[list[int], dict[int, int]]]:
    """`attention_groups` in the form of `groups_by_hand`."""
    made = attention_groups(layout, scope)
    groups, at = [], 0
    for start, length, keys in zip(made.start.tolist(), made.length.tolist(), made.key_length.tolist(), strict=True):
        rows = made.keys[at : at + keys].tolist()
        assert len(set(rows)) == len(rows)
        groups.append(
            (list(range(start, start + length)), dict(zip(rows, made.count[at : at + keys].tolist(), strict=True)))
        )
        at += keys
    assert at == len(made.keys) == len(made.count)
    return groups


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5), (4, 6), (5, 7), (8, 8), (9, 4), (13, 2), (1, 17)])
@pytest.mark.parametrize("pairs", [1, 3])
def test_window_order_is_hugging_faces(size, pairs):
    index, ends = get_vision_window_index(
        torch.tensor([[pairs, size[0] * 2, size[1] * 2]]), spatial_merge_size=2, window_size=112, patch_size=14
    )
    layout = full_layout(geometry(*size), pairs)
    assert torch.equal(layout.unit, index)
    windows = attention_groups(layout, "window")
    assert (windows.length * 4).tolist() == ends.diff().tolist()
    assert geometry(*size).windows * pairs == len(windows.length)


@pytest.mark.parametrize("scope", SCOPES)
def test_dropped_units_have_no_key(scope):
    layout = random_layout(geometry(5, 6), 2, ["window", "pair"], seed=3)
    owner = layout.unit_to_row.clone()
    lost = [u for u in range(0, len(owner), 3) if u not in layout.unit.tolist()]
    assert lost
    owner[lost] = -1
    layout = TokenLayout(layout.geometry, layout.pairs, layout.unit, owner, "pair")
    assert groups_as_made(layout, scope) == groups_by_hand(layout, scope)
    assert layout.size.sum() == len(owner) - len(lost)
    merged, _ = merge_at_random(layout, "pair", 1)
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
    assert attention_groups(random_layout(geometry(6, 9), 2, scopes, seed=1), scope).consecutive == plain


@st.composite
def sources(draw):
    """The frame pair that has the row of each unit, `[T, H*W]`, at random, earlier chunks from -1 down; and the geometry."""
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
    layout = referring(geo, source)
    encoded = [t * geo.units + p for t, places in enumerate(source.tolist()) for p, at in enumerate(places) if at == t]
    rows = sorted(encoded, key=lambda unit: place_key(geo, unit))
    assert layout.unit.tolist() == rows and layout.rows == len(rows)
    for unit, row in enumerate(layout.unit_to_row.tolist()):
        pair, place = divmod(unit, geo.units)
        at = int(source[pair, place])
        assert row == (rows.index(at * geo.units + place) if at >= 0 else len(rows) + place)
    assert list(layout.counts) == [sum(unit // geo.units == pair for unit in rows) for pair in range(len(source))]
    assert layout.counts == layout.per_pair and layout.pairs == len(source)
    assert layout.reach == ("place" if len(rows) == source.numel() else "clip")
    if layout.reach == "place":
        full = full_layout(geo, len(source))
        assert torch.equal(layout.unit, full.unit) and torch.equal(layout.unit_to_row, full.unit_to_row)


@settings(deadline=None, max_examples=100)
@given(sources(), st.sampled_from(SCOPES))
def test_groups_see_rows_of_earlier_frame_pairs(made, scope):
    source, geo = made
    layout = referring(geo, source)
    pair_of_row = (layout.unit // geo.units).tolist() + [-1] * geo.units
    by_hand = groups_by_hand(layout, scope)
    assert groups_as_made(layout, scope) == by_hand
    assert layout.pair_of_row.tolist() == pair_of_row
    groups = attention_groups(layout, scope)
    if layout.reach != "place":
        assert not groups.consecutive and groups.key_length.sum() == len(groups.keys)
        assert (groups.keys < layout.rows + geo.units).all()


@settings(deadline=None, max_examples=60)
@given(shapes, st.floats(0, 1), st.integers(0, 99))
def test_selected_units_are_rows_in_window_order_and_own_their_clusters(grid, share, seed):
    random, n, geo = torch.Generator().manual_seed(seed), prod(grid), geometry(*grid[1:])
    keep = max(1, round(share * n))
    kept = torch.randperm(n, generator=random)[:keep].sort().values
    owner = torch.randint(keep, (n,), generator=random)
    owner[kept] = torch.arange(keep)
    units, (_, rank) = torch.arange(n), order_tables(geo, grid[0])
    rows = Rows(units[:, None], units[:, None, None], units, units)
    made = rows.take(Selection(kept, owner, averages=False), owner, rank)
    layout = TokenLayout(geo, grid[0], made.unit, made.unit_to_row, "clip")
    alive = torch.zeros(n, dtype=torch.bool).index_fill_(0, kept, True).view(grid[0], -1)
    assert torch.equal(made.unit, window_order(geo, grid[0], alive, keep)) and torch.equal(made.unit, made.values[:, 0])
    assert torch.equal(made.unit[made.unit_to_row], kept[owner]) and torch.equal(made.unit, made.deepstack[:, 0, 0])
    assert sum(layout.per_pair) == layout.rows == keep
