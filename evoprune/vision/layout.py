"""Which rows the encoder computes, which units they stand for, and who attends to whom. Index bookkeeping, no features.

A *unit* is a 2x2 block of patches, the smallest thing that is kept, merged or dropped, because the patch merger turns each
into one token. A video of T grids with H x W units each has N = T*H*W units, numbered grid after grid in raster order
(Hugging Face's order). A *row* is a unit that is still being computed. It sits at the place of one unit, its `home`, and
may stand for many: `owner` says which row stands for each unit. Everything else follows from these two.

Rows always lie in *window order*: by grid, then by 4x4-unit window, then in raster order, so that both windows and grids are
runs of neighbouring rows.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F

from evoprune.pruning.indices import tally, true_indices

Scope = Literal["window", "grid", "block"]
Reach = Literal["place", "window", "grid", "block", "clip"]
WIDTH = {reach: width for width, reach in enumerate(("place", "window", "grid", "block", "clip"))}


@dataclass(frozen=True)
class Geometry:
    """A grid of H x W units cut into windows of `side` x `side` units (112 pixels are 4 units)."""

    height: int
    width: int
    side: int

    @property
    def units(self) -> int:
        return self.height * self.width

    @property
    def windows(self) -> int:
        return -(-self.height // self.side) * -(-self.width // self.side)

    @property
    def largest_window(self) -> int:
        """Units of the largest window."""
        return min(self.height, self.side) * min(self.width, self.side)

    @cached_property
    def window(self) -> torch.Tensor:
        """int64 `[H*W]`: the window of each place, numbered in raster order."""
        y, x = torch.arange(self.height) // self.side, torch.arange(self.width) // self.side
        return (y[:, None] * -(-self.width // self.side) + x).flatten()

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 `[H*W]`: the places in window order."""
        return self.window.argsort(stable=True)


@lru_cache(maxsize=64)
def geometry(height: int, width: int, side: int = 4, device: str = "cpu") -> Geometry:
    """The geometry of a grid of height x width units, made once a device; its tensors live on torch's default device."""
    return Geometry(height, width, side)


@dataclass(frozen=True)
class TokenLayout:
    """The live rows of some grids.

    Attributes:
        geometry: of one grid.
        grids: how many there are.
        home: int64 `[R]`, the unit at whose place each row sits; in window order.
        owner: int64 `[N]`, the row that stands for each unit, or -1 for a dropped one. From R on it is a row of the grids before
            these, of which only keys and values are left: R + p for the one that is the reference of place p.
        reach: how far apart a unit and its owner may be: in the same place, in one window, grid or block, or anywhere in
            the clip. Groups at least that wide contain all rows that matter to them.
        counts: rows of each block, where the host knows them.
        block: grids of a block, the widest that rows are merged in.
    """

    geometry: Geometry
    grids: int
    home: torch.Tensor
    owner: torch.Tensor
    reach: Reach = "place"
    counts: tuple[int, ...] | None = None
    block: int = 1

    @property
    def rows(self) -> int:
        return len(self.home)

    @cached_property
    def size(self) -> torch.Tensor:
        """int64 `[R]`: how many units of its own block each row stands for."""
        sizes = torch.zeros(self.rows + 1, dtype=torch.int64)
        row = torch.where(self.owner >= 0, self.owner, self.rows).clamp(max=self.rows)
        if self.reach == "clip":
            home = F.pad(self.group_of(self.home, "block"), (0, 1), value=-1)
            near = home[row] == self.group_of(torch.arange(len(row)), "block")
            row = torch.where(near, row, self.rows)
        return sizes.scatter_add_(0, row, torch.ones_like(row))[:-1]

    @cached_property
    def per_block(self) -> tuple[int, ...]:
        """Rows of each block; waits for the device only if `counts` does not say."""
        return self.counts or tuple(tally(self.group_of(self.home, "block"), self.group_count("block")).tolist())

    def longest(self, scope: Scope) -> int:
        """At most how many rows a group has, as far as the host knows."""
        most = {"window": self.geometry.largest_window, "grid": self.geometry.units, "block": self.rows}
        return min(max(self.per_block), most[scope])

    @cached_property
    def place(self) -> torch.Tensor:
        """int64 `[R]`: raster index of each row inside its grid."""
        return self.home % self.geometry.units

    def group_count(self, scope: Scope) -> int:
        if scope == "block":
            return -(-self.grids // self.block)
        return self.grids * (self.geometry.windows if scope == "window" else 1)

    def group_of(self, unit: torch.Tensor, scope: Scope) -> torch.Tensor:
        """The window, grid or block in which each of `unit` (int64, any shape) lies, numbered over all grids."""
        grid = unit // self.geometry.units
        if scope == "window":
            return grid * self.geometry.windows + self.geometry.window[unit % self.geometry.units]
        return grid if scope == "grid" else grid // self.block


def window_order(geo: Geometry, grids: int, alive: torch.Tensor | None = None) -> torch.Tensor:
    """int64 `[R]`: the units of some grids in window order; only those of `alive` (bool `[T, H*W]`), if given."""
    units = torch.arange(grids)[:, None] * geo.units + geo.order
    return units.flatten() if alive is None else units[alive[:, geo.order]]


def full_layout(geo: Geometry, grids: int, block: int = 1) -> TokenLayout:
    """Every unit is a row of its own."""
    home = window_order(geo, grids)
    owner = torch.empty_like(home)
    owner[home] = torch.arange(len(home))
    counts = tuple(geo.units * min(block, grids - first) for first in range(0, grids, block))
    return TokenLayout(geo, grids, home, owner, "place", counts, block)


def referring_layout(geo: Geometry, source: torch.Tensor, block: int = 1) -> TokenLayout:
    """Some units are rows, the others have a row of the same place in an earlier grid as their owner.

    Args:
        source: int64 `[T, H*W]` on the CPU: the grid that has the row of each unit, its own number or a lower one; below 0 one of
            the grids before these.
    """
    grids = len(source)
    alive = source == torch.arange(grids)[:, None]
    home = window_order(geo, grids, alive)
    rows = len(home)
    number = torch.zeros(grids * geo.units, dtype=torch.int64)
    number[home] = torch.arange(rows)
    place = torch.arange(geo.units)
    owner = torch.where(source >= 0, number[source.clamp(min=0) * geo.units + place], rows + place).flatten()
    counts = tuple(int(part.sum()) for part in alive.split(block))
    return TokenLayout(geo, grids, home, owner, "place" if bool(alive.all()) else "clip", counts, block)


def chosen_layout(
    geo: Geometry, grids: int, kept: torch.Tensor, stands: torch.Tensor
) -> tuple[TokenLayout, torch.Tensor]:
    """Some units are rows, and each of the others has one of them as its owner, wherever in the clip that one is.

    Args:
        kept: int64 `[K]`, ascending: the units that are rows.
        stands: int64 `[T * H*W]`, indices into `kept`, -1 for a unit that is dropped.

    Returns:
        The layout; and int64 `[K]`, which of `kept` each of its rows is.
    """
    place = geo.order.argsort()  # where each place comes in window order
    order = (kept // geo.units * geo.units + place[kept % geo.units]).argsort()
    owner = torch.where(stands >= 0, order.argsort()[stands.clamp(min=0)], -1)
    return TokenLayout(geo, grids, kept[order], owner, "clip"), order


def merged_layout(
    layout: TokenLayout,
    into: torch.Tensor,
    scope: Scope,
    rows: int | None = None,
    counts: tuple[int, ...] | None = None,
) -> TokenLayout:
    """The layout after every row r has gone into row `into[r]`; a row that stays has `into[r] == r`.

    Args:
        into: int64 `[R]`; where a row goes must itself stay.
        scope: the groups inside which rows were merged.
        rows: how many the result has; default: those that stay, which waits for the device. If it is more, the rest is padding:
            rows without units, whose `home` is the first unit after the last block, were it whole, so that they form a group of
            their own.
        counts: rows of each block, where known.
    """
    stays = into == torch.arange(len(into))
    rows = int(stays.sum()) if rows is None else rows
    number = (stays.cumsum(0) - 1).clamp(max=rows - 1)
    before = rows + torch.arange(layout.geometry.units)  # rows of earlier grids come after all of these
    owner = torch.where(layout.owner >= 0, torch.cat([number[into], before])[layout.owner.clamp(min=0)], -1)
    if scope == "block" and layout.block == 1:
        scope = "grid"
    reach = max(scope, layout.reach, key=WIDTH.get)
    nowhere = layout.group_count("block") * layout.block * layout.geometry.units
    home = torch.where(torch.arange(rows) < stays.sum(), layout.home[true_indices(stays, rows)], nowhere)
    return TokenLayout(layout.geometry, layout.grids, home, owner, reach, counts, layout.block)


@dataclass(frozen=True)
class Groups:
    """Windows or grids as attention sees them: each with its query rows and its list of key/value rows.

    Query rows of a group are neighbours: `start[g] : start[g] + length[g]`. A list that is not `exact` has what a device can
    compute while the host goes ahead: also groups without rows, and unused keys after the last group's.

    Attributes:
        start, length: int64 `[G]`.
        consecutive: the keys are exactly the query rows (plain attention); then `keys` is simply all rows.
        keys: int64 `[sum of key_length, or more]`, rows, group after group: its own, and rows elsewhere that own some of its units.
        key_length: int64 `[G]`.
        count: int64, like `keys`: how many of the group's units each key row stands for.
        near: bool, like `keys`: whether the row is one of the group's own block; None where all are.
        longest: at most how many rows and how many keys a group has.
        even: whether all groups are known to be of the first of these lengths.
    """

    start: torch.Tensor
    length: torch.Tensor
    consecutive: bool
    keys: torch.Tensor
    key_length: torch.Tensor
    count: torch.Tensor
    longest: tuple[int, int]
    even: bool
    near: torch.Tensor | None = None


def attention_groups(layout: TokenLayout, scope: Scope, exact: bool = True) -> Groups:
    """Who attends to whom in a layer whose attention is limited to `scope`."""
    geo, total = layout.geometry, layout.group_count(scope)
    length = tally(layout.group_of(layout.home, scope), total)
    start = length.cumsum(0) - length
    longest = layout.longest(scope)
    if WIDTH[layout.reach] <= WIDTH[scope]:
        if scope == "window":
            even = layout.reach == "place" and geo.windows * geo.largest_window == geo.units
        else:
            even = layout.block == 1 and min(layout.per_block) == longest
        even = even or (layout.rows == len(layout.owner) and scope == "grid")
        keys, key_length, count = torch.arange(layout.rows), length, layout.size
        groups = Groups(start, length, True, keys, key_length, count, (longest, longest), even)
    else:
        # Pairs (group, row that stands for some of its units), and how many units that are. A row whose own unit went
        # elsewhere cannot be: a row always owns its home, so its home group lists it.
        units, rows = len(layout.owner), layout.rows + geo.units
        group = layout.group_of(torch.arange(units), scope)
        asked = (layout.owner >= 0) & (length[group] > 0)  # a group without query rows asks nothing
        unused = total * rows
        pairs = torch.where(asked, group * rows + layout.owner, unused).sort().values
        new = torch.cat([torch.ones(1, dtype=torch.bool), pairs[1:] != pairs[:-1]])
        slot = torch.where(pairs < unused, new.cumsum(0) - 1, units)
        keys = torch.full((units + 1,), unused).scatter_(0, slot, pairs)[:units]
        key_length = tally(keys // rows, total + 1)[:total]
        count = tally(slot, units + 1)[:units]
        longest_keys, near = geo.largest_window if scope == "window" else geo.units, None
        if layout.reach == "clip":
            home = F.pad(layout.group_of(layout.home, "block"), (0, geo.units), value=-1)
            near = home[keys % rows] == keys // rows // (total // layout.grids) // layout.block
        groups = Groups(start, length, False, keys % rows, key_length, count, (longest, longest_keys), False, near)
    return _trimmed(groups) if exact else groups


def _trimmed(groups: Groups) -> Groups:
    """Without empty groups and unused keys."""
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
