"""The rows that the encoder computes, the units that they represent, and the groups in which they attend. Indices, no features.

A *unit* is a 2x2 block of patches. Units are kept, merged or dropped whole, because the patch merger turns each into one
token. A video of T frame pairs with H x W units each has N = T*H*W units, in raster order, frame pair after frame pair
(Hugging Face's order). A *row* is a unit that is still computed. It has the place of one unit (`unit`) and may represent many
(`owner`). Everything else follows from these two.

Rows are always in *window order*: by frame pair, then by window of 4x4 units, then in raster order. So windows and frame
pairs are runs of neighbouring rows.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F

from evoprune.backend import devices
from evoprune.methods.indices import ascending, tally, true_indices

Scope = Literal["window", "pair"]
Reach = Literal["place", "window", "pair", "clip"]
WIDTH = {reach: width for width, reach in enumerate(("place", "window", "pair", "clip"))}


@dataclass(frozen=True)
class Geometry:
    """A frame pair of H x W units cut into windows of `side` x `side` units (112 pixels are 4 units), on torch's `device`."""

    height: int
    width: int
    side: int
    device: str

    @property
    def units(self) -> int:
        return self.height * self.width

    @property
    def windows(self) -> int:
        return -(-self.height // self.side) * -(-self.width // self.side)

    @property
    def largest_window(self) -> int:
        """Number of units in the largest window."""
        return min(self.height, self.side) * min(self.width, self.side)

    @cached_property
    def window(self) -> torch.Tensor:
        """int64 `[H*W]`: the window of each place, numbered in raster order."""
        y, x = ascending(self.height, self.device) // self.side, ascending(self.width, self.device) // self.side
        return (y[:, None] * -(-self.width // self.side) + x).flatten()

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 `[H*W]`: the places in window order."""
        return self.window.argsort(stable=True)


@lru_cache(maxsize=64)
def geometry(height: int, width: int, side: int = 4, device: str = "cpu") -> Geometry:
    """The geometry of `height` x `width` units, cached for each device."""
    return Geometry(height, width, side, device)


@dataclass(frozen=True)
class TokenLayout:
    """The live rows of a run of frame pairs."""

    geometry: Geometry  # of one frame pair
    pairs: int
    unit: torch.Tensor  # int64 `[R]`, the unit whose place each row has, in window order
    # int64 `[N]`, the row that represents each unit, or -1 for a dropped one. R + p is the row that an earlier chunk encoded at
    # place p. Of it only keys and values are left (`chunks.CarriedKeys`).
    owner: torch.Tensor
    # Where a unit's owner may be: at the same place, in the same window or frame pair, or anywhere in the clip. A group of at
    # least this scope contains all owners of its units.
    reach: Reach = "place"
    counts: tuple[int, ...] | None = None  # rows of each frame pair; None where only the device knows them

    @property
    def rows(self) -> int:
        return len(self.unit)

    @cached_property
    def size(self) -> torch.Tensor:
        """int64 `[R]`: the cluster size of each row; rows of earlier chunks are left out."""
        sizes = torch.zeros(self.rows + 1, dtype=torch.int64, device=self.owner.device)
        row = torch.where(self.owner >= 0, self.owner, self.rows).clamp(max=self.rows)
        return sizes.scatter_add_(0, row, torch.ones_like(row))[:-1]

    @cached_property
    def per_pair(self) -> tuple[int, ...]:
        """Rows of each frame pair; waits for an accelerator if `counts` is None."""
        return self.counts or tuple(tally(self.group_of(self.unit, "pair"), self.pairs).tolist())

    def longest(self, scope: Scope) -> int:
        """An upper bound of the rows of a group, computed without waiting."""
        most = self.geometry.largest_window if scope == "window" else self.geometry.units
        known = self.counts or devices.exact_shapes(self.unit.device)
        return min(max(self.per_pair) if known else self.rows, most)

    @cached_property
    def place(self) -> torch.Tensor:
        """int64 `[R]`: raster index of each row inside its frame pair."""
        return self.unit % self.geometry.units

    def group_count(self, scope: Scope) -> int:
        """Number of windows or frame pairs."""
        return self.pairs * (self.geometry.windows if scope == "window" else 1)

    def group_of(self, unit: torch.Tensor, scope: Scope) -> torch.Tensor:
        """The number of the window or frame pair of each unit (int64, any shape), counted over all frame pairs."""
        return group_table(self.geometry, self.pairs, scope)[unit]


@lru_cache(maxsize=64)
def group_table(geo: Geometry, pairs: int, scope: Scope) -> torch.Tensor:
    """int64 `[T * H*W + 1]`: the number of the window or frame pair of each unit, and of padding, which is after the last."""
    pair, place = ascending(pairs + 1, geo.device), torch.zeros_like(geo.window)
    if scope == "window":
        pair, place = pair * geo.windows, geo.window
    return (pair[:, None] + place).flatten()[: pairs * geo.units + 1].clone()


@lru_cache(maxsize=64)
def order_tables(geo: Geometry, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 `[T * H*W]`, twice: all units in window order, and the rank of each unit in it."""
    order = (ascending(pairs, geo.device)[:, None] * geo.units + geo.order).flatten()
    return order, order.argsort()


def window_order(geo: Geometry, pairs: int, alive: torch.Tensor | None = None, count: int = 0) -> torch.Tensor:
    """int64 `[R]`: the units of `pairs` frame pairs in window order; with `alive` (bool `[T, H*W]`) those `count`."""
    units, _ = order_tables(geo, pairs)
    return units if alive is None else units[true_indices(alive.flatten()[units], count)]


def full_layout(geo: Geometry, pairs: int) -> TokenLayout:
    """The layout in which every unit is a row."""
    return TokenLayout(geo, pairs, *order_tables(geo, pairs), "place", (geo.units,) * pairs)


def referring_layout(geo: Geometry, source: torch.Tensor, counts: tuple[int, ...]) -> TokenLayout:
    """The layout with reuse: some units are rows, and each other unit is owned by a row at its place in an earlier frame pair.

    `source`, `counts`: as in `Chunk`, the first counted from the first of these frame pairs; a negative number is one of an earlier
    chunk.
    """
    pairs, rows = len(source), sum(counts)
    alive = source == ascending(pairs, source.device)[:, None]
    unit = window_order(geo, pairs, alive, rows)
    number = torch.zeros(pairs * geo.units, dtype=torch.int64, device=source.device)
    number[unit] = ascending(rows, source.device)
    place = ascending(geo.units, source.device)
    owner = torch.where(source >= 0, number[source.clamp(min=0) * geo.units + place], rows + place).flatten()
    return TokenLayout(geo, pairs, unit, owner, "place" if rows == pairs * geo.units else "clip", counts)


def selected_layout(
    geo: Geometry, pairs: int, kept: torch.Tensor, owner: torch.Tensor
) -> tuple[TokenLayout, torch.Tensor]:
    """The layout after a selection, and int64 `[K]`, the index in `kept` of each of its rows.

    `kept`: int64 `[K]`, ascending, the units that are rows; `owner`: int64 `[T * H*W]`, which of them owns each unit, anywhere in
    the clip, -1 for one that is dropped.
    """
    order = order_tables(geo, pairs)[1][kept].argsort()
    row = torch.where(owner >= 0, order.argsort()[owner.clamp(min=0)], -1)
    return TokenLayout(geo, pairs, kept[order], row, "clip"), order


def merged_layout(
    layout: TokenLayout,
    into: torch.Tensor,
    scope: Scope,
    rows: int | None = None,
    counts: tuple[int, ...] | None = None,
) -> TokenLayout:
    """The layout after every row r has merged into row `into[r]` (int64 `[R]`), itself if it stays, inside groups of `scope`.

    Args:
        rows: number of rows in the result. Default: the rows that stay, whose count synchronises. If it is more, the last rows are
            padding: they own no unit, and their `unit` is the first after the last frame pair, so they form a group of their own.
        counts: rows of each frame pair, if known.
    """
    stays = into == ascending(len(into), into.device)
    rows = int(stays.sum()) if rows is None else rows
    number = (stays.cumsum(0) - 1).clamp(max=rows - 1)
    owner = torch.where(layout.owner >= 0, number[into][layout.owner.clamp(min=0)], -1)
    reach = max(scope, layout.reach, key=WIDTH.get)
    nowhere = layout.pairs * layout.geometry.units
    unit = torch.where(ascending(rows, into.device) < stays.sum(), layout.unit[true_indices(stays, rows)], nowhere)
    return TokenLayout(layout.geometry, layout.pairs, unit, owner, reach, counts)


@dataclass(frozen=True)
class Groups:
    """Windows or frame pairs as attention reads them, each with its query rows and its key rows.

    Query rows of a group are neighbours: `start[g] : start[g] + length[g]`. Groups that are not exact (see `attention_groups`) may
    include groups without rows, and unused keys at the end.
    """

    start: torch.Tensor  # int64 `[G]`
    length: torch.Tensor  # int64 `[G]`
    consecutive: bool  # whether the keys of each group are its query rows; then `keys` is all rows
    # int64 `[sum of key_length, or more]`, key rows, group after group: its own, and other rows that own some of its units
    keys: torch.Tensor
    key_length: torch.Tensor  # int64 `[G]`
    count: torch.Tensor  # int64, like `keys`: how many of the group's units each key row represents
    longest: tuple[int, int]  # upper bounds of the rows and of the keys of a group
    even: bool  # whether every group is known to have `longest[0]` rows
    near: torch.Tensor | None = None  # bool, like `keys`: whether the row is of the group's own frame pair; None: all


def attention_groups(layout: TokenLayout, scope: Scope, exact: bool = True) -> Groups:
    """The groups of a layer whose attention is limited to `scope`; `exact` removes empty ones and unused keys, and synchronises."""
    length = tally(layout.group_of(layout.unit, scope), layout.group_count(scope))
    if WIDTH[layout.reach] > WIDTH[scope]:
        groups = _owner_groups(layout, scope, length)
    else:  # the keys of a group are its own rows
        geo, longest, start = layout.geometry, layout.longest(scope), length.cumsum(0) - length
        even = layout.counts is not None and min(layout.counts) == longest
        if scope == "window":
            even = layout.reach == "place" and geo.windows * geo.largest_window == geo.units
        keys = ascending(layout.rows, length.device)
        groups = Groups(start, length, True, keys, length, layout.size, (longest, longest), even)
    if not exact:
        return groups
    used, keys = groups.length > 0, int(groups.key_length.sum())
    return replace(
        groups,
        start=groups.start[used],
        length=groups.length[used],
        keys=groups.keys[:keys],
        key_length=groups.key_length[used],
        count=groups.count[:keys],
        near=None if groups.near is None else groups.near[:keys],
    )


def _owner_groups(layout: TokenLayout, scope: Scope, length: torch.Tensor) -> Groups:
    """Groups whose keys are all rows that own some of their units, in any frame pair.

    A row owns the unit whose place it has, so it is a key of its own group.
    """
    geo, total = layout.geometry, layout.group_count(scope)
    units, rows = len(layout.owner), layout.rows + geo.units
    group = group_table(geo, layout.pairs, scope)[:-1]
    asked = (layout.owner >= 0) & (length[group] > 0)  # a group without query rows needs no keys
    unused = total * rows
    both = torch.where(asked, group * rows + layout.owner, unused).sort().values  # (group, row that owns a unit of it)
    slot = torch.where(both < unused, F.pad((both[1:] != both[:-1]).cumsum(0), (1, 0)), units)
    keys = torch.full((units + 1,), unused, dtype=torch.int64, device=length.device).scatter_(0, slot, both)[:units]
    of, keys = keys // rows, keys % rows
    key_length = tally(of, total + 1)[:total]
    count = tally(slot, units + 1)[:units]
    longest_keys, near = geo.largest_window if scope == "window" else geo.units, None
    if layout.reach == "clip":
        pair = F.pad(layout.group_of(layout.unit, "pair"), (0, geo.units), value=-1)
        near = pair[keys] == (of if scope == "pair" else of // geo.windows)
    start, longest = length.cumsum(0) - length, (layout.longest(scope), longest_keys)
    return Groups(start, length, False, keys, key_length, count, longest, False, near)
