import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_window_index

from evoprune.vision.layout import TokenLayout, attention_groups, full_layout, geometry, merged_layout, referring_layout
from tests.vision.tower import group_key, groups_by_hand, merge_at_random, place_key, random_layout

SCOPES = ("window", "grid")
shapes = st.tuples(st.integers(1, 3), st.integers(1, 10), st.integers(1, 10))
merges = st.lists(st.sampled_from((*SCOPES, "block")), min_size=1, max_size=4)


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
@pytest.mark.parametrize("grids", [1, 3])
def test_window_order_is_hugging_faces(size, grids):
    index, ends = get_vision_window_index(
        torch.tensor([[grids, size[0] * 2, size[1] * 2]]), spatial_merge_size=2, window_size=112, patch_size=14
    )
    layout = full_layout(geometry(*size), grids)
    assert torch.equal(layout.home, index)
    windows = attention_groups(layout, "window")
    assert (windows.length * 4).tolist() == ends.diff().tolist()
    assert geometry(*size).windows * grids == len(windows.length)


def test_a_full_layout_owns_itself():
    layout = full_layout(geometry(5, 6), 2)
    assert torch.equal(layout.home[layout.owner], torch.arange(60))
    assert layout.size.tolist() == [1] * 60
    assert torch.equal(layout.place, layout.home % 30)


@settings(deadline=None, max_examples=120)
@given(shapes, merges, st.integers(0, 99))
def test_merging_keeps_the_books(shape, scopes, seed):
    grids, height, width = shape
    geo = geometry(height, width)
    layout = full_layout(geo, grids, 2)
    for step, scope in enumerate(scopes):
        before = layout
        layout, into = merge_at_random(before, scope, seed + step)
        stays = into == torch.arange(before.rows)
        assert torch.equal(layout.home, before.home[stays])
        # Every unit now belongs to the row at whose home its old owner's target sat.
        assert torch.equal(layout.home[layout.owner], before.home[into[before.owner]])
    units = torch.arange(grids * geo.units)
    assert ((layout.owner >= 0) & (layout.owner < layout.rows)).all()
    assert torch.equal(layout.owner[layout.home], torch.arange(layout.rows))
    assert layout.size.sum() == len(units) and (layout.size >= 1).all()
    keys = [place_key(geo, home) for home in layout.home.tolist()]
    assert keys == sorted(keys)
    if scopes:
        widest = max(scopes, key=("window", "grid", "block").index)
        assert layout.reach == widest
        assert torch.equal(layout.group_of(units, widest), layout.group_of(layout.home[layout.owner], widest))


def test_merging_goes_by_the_map_it_is_given():
    layout = full_layout(geometry(1, 4), 1)
    layout = merged_layout(layout, torch.tensor([0, 0, 2, 0]), "window")
    assert (layout.home.tolist(), layout.owner.tolist(), layout.size.tolist()) == ([0, 2], [0, 0, 1, 0], [3, 1])
    layout = merged_layout(layout, torch.tensor([1, 1]), "grid")
    assert (layout.home.tolist(), layout.owner.tolist(), layout.reach) == ([2], [0, 0, 0, 0], "grid")


@settings(deadline=None, max_examples=120)
@given(shapes, st.sampled_from(SCOPES), st.integers(0, 99))
def test_groups_are_numbered_over_all_grids_in_window_order(shape, scope, seed):
    grids, height, width = shape
    geo = geometry(height, width)
    layout = random_layout(geo, grids, ["grid"], seed)
    units = torch.arange(grids * geo.units)
    names = sorted({group_key(geo, unit, scope) for unit in units.tolist()})
    assert layout.group_count(scope) == len(names)
    assert layout.group_of(units, scope).tolist() == [names.index(group_key(geo, u, scope)) for u in units.tolist()]


@settings(deadline=None, max_examples=150)
@given(shapes, merges, st.sampled_from(SCOPES), st.integers(0, 99))
def test_attention_groups_against_loops(shape, scopes, scope, seed):
    grids, height, width = shape
    layout = random_layout(geometry(height, width), grids, scopes, seed)
    assert groups_as_made(layout, scope) == groups_by_hand(layout, scope)


def test_a_window_without_rows_of_its_own_asks_nothing_but_its_owner_is_seen_elsewhere():
    # Two windows of 4x4. All of the second goes into the first row of the first, the rest stays.
    layout = full_layout(geometry(4, 8), 1)
    into = torch.arange(32)
    into[16:] = 0
    layout = merged_layout(layout, into, "grid")
    made = attention_groups(layout, "window")
    assert (made.start.tolist(), made.length.tolist()) == ([0], [16])
    assert made.count.tolist() == [1] * 16  # only units of this window are counted
    assert attention_groups(layout, "grid").count.tolist() == [17] + [1] * 15


def test_a_row_that_owns_units_of_another_window_is_a_key_there_with_their_number():
    layout = full_layout(geometry(4, 8), 1)
    into = torch.arange(32)
    into[[17, 18, 19]] = 5
    layout = merged_layout(layout, into, "grid")
    (first, first_keys), (second, second_keys) = groups_as_made(layout, "window")
    assert len(first) == 16 and first_keys == dict.fromkeys(range(16), 1)
    assert len(second) == 13 and second_keys == {5: 3} | dict.fromkeys(second, 1)


@pytest.mark.parametrize("scope", SCOPES)
def test_dropped_units_are_nobodys_keys(scope):
    layout = random_layout(geometry(5, 6), 2, ["window", "grid"], seed=3)
    owner = layout.owner.clone()
    lost = [u for u in range(0, len(owner), 3) if u not in layout.home.tolist()]
    assert lost
    owner[lost] = -1
    layout = TokenLayout(layout.geometry, layout.grids, layout.home, owner, "grid")
    assert groups_as_made(layout, scope) == groups_by_hand(layout, scope)
    assert layout.size.sum() == len(owner) - len(lost)
    merged, _ = merge_at_random(layout, "grid", 1)
    assert (merged.owner[lost] == -1).all() and (merged.owner >= 0).sum() == len(owner) - len(lost)


def test_groups_cover_every_row_once_and_are_plain_as_long_as_no_row_left_its_group():
    geo = geometry(6, 9)
    for scopes, scope, plain in (
        ([], "window", True),
        (["window"], "window", True),
        (["window", "window"], "grid", True),
        (["window", "grid"], "grid", True),
        (["grid", "window"], "window", False),
    ):
        layout = random_layout(geo, 2, scopes, seed=1)
        made = attention_groups(layout, scope)
        assert made.consecutive == plain
        assert made.length.sum() == layout.rows and (made.length > 0).all()
        assert made.start.tolist() == (made.length.cumsum(0) - made.length).tolist()


# --- references to earlier grids ---------------------------------------------------------------------------------------


@st.composite
def sources(draw):
    """Where the row of each unit is, `[T, H*W]`, at random; and the geometry. Earlier grids count from -1 down."""
    grids, height, width = draw(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    changed = torch.rand(grids, height * width, generator=random) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    last = -torch.randint(1, 4, (height * width,), generator=random)
    if not draw(st.booleans()):
        changed[0] = True
    source = torch.empty(grids, height * width, dtype=torch.int64)
    for g in range(grids):
        last = source[g] = torch.where(changed[g], g, last)
    return source, geometry(height, width)


@settings(deadline=None, max_examples=120)
@given(sources(), st.integers(1, 3))
def test_references_against_loops(made, block):
    source, geo = made
    layout = referring_layout(geo, source, block)
    alive = [g * geo.units + p for g, places in enumerate(source.tolist()) for p, at in enumerate(places) if at == g]
    homes = sorted(alive, key=lambda unit: place_key(geo, unit))
    assert layout.home.tolist() == homes and layout.rows == len(homes)
    for unit, row in enumerate(layout.owner.tolist()):
        g, p = divmod(unit, geo.units)
        at = int(source[g, p])
        assert row == (homes.index(at * geo.units + p) if at >= 0 else len(homes) + p)
    blocks = range(0, len(source), block)
    assert list(layout.counts) == [
        sum(first <= home // geo.units < first + block for home in homes) for first in blocks
    ]
    assert layout.counts == layout.per_block and layout.block == block and layout.grids == len(source)
    assert layout.reach == ("place" if len(homes) == source.numel() else "clip")
    if layout.reach == "place":
        full = full_layout(geo, len(source), block)
        assert torch.equal(layout.home, full.home) and torch.equal(layout.owner, full.owner)


def owned_by_hand(layout: TokenLayout) -> list[int]:
    """How many units of its own block each row stands for."""
    span, homes = layout.geometry.units * layout.block, layout.home.tolist()
    sizes = [0] * layout.rows
    for unit, row in enumerate(layout.owner.tolist()):
        if row < layout.rows and homes[row] // span == unit // span:
            sizes[row] += 1
    return sizes


@settings(deadline=None, max_examples=200)
@given(sources(), st.integers(1, 3), st.lists(st.sampled_from((*SCOPES, "block")), max_size=3), st.integers(0, 99))
def test_groups_see_rows_of_earlier_grids(made, block, scopes, seed):
    source, geo = made
    layout = referring_layout(geo, source, block)
    for step, scope in enumerate(scopes):
        before, layout = layout, merge_at_random(layout, scope, seed + step)[0]
        carried = before.owner >= before.rows
        assert torch.equal(layout.owner[carried] - layout.rows, before.owner[carried] - before.rows)
        assert (layout.owner[~carried] < layout.rows).all()
        if before.reach == "clip":
            assert layout.reach == "clip"
    assert layout.size.tolist() == owned_by_hand(layout)
    blocks = layout.group_of(layout.home, "block").tolist() + [-1] * geo.units
    for scope in SCOPES:
        by_hand = groups_by_hand(layout, scope)
        assert groups_as_made(layout, scope) == by_hand
        for exact in (True, False):
            groups = attention_groups(layout, scope, exact)
            if layout.reach == "clip":
                near = [blocks[row] == blocks[rows[0]] for rows, keys in by_hand for row in sorted(keys)]
                assert groups.near[: len(near)].tolist() == near
                assert not groups.consecutive and not groups.even
                assert (groups.keys < layout.rows + geo.units).all()
                assert groups.key_length.sum() == len(near)
                assert groups.length.amax() <= groups.longest[0] if layout.rows else True
                assert groups.key_length.amax() <= groups.longest[1] if layout.rows else True
            else:
                assert groups.near is None


def test_padding_lies_outside_every_block():
    layout = full_layout(geometry(1, 4), 3, block=2)  # the last block is a grid short
    into = torch.arange(12)
    into[[1, 5, 9]] = torch.tensor([0, 4, 8])
    layout = merged_layout(layout, into, "block", rows=12)
    assert layout.home.tolist() == [0, 2, 3, 4, 6, 7, 8, 10, 11, 16, 16, 16]
    assert layout.group_of(layout.home, "block").tolist() == [0] * 6 + [1] * 3 + [2] * 3
    assert layout.size.tolist() == [2, 1, 1] * 3 + [0] * 3
