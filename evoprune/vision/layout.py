"""Which rows the encoder computes, which units they represent, and who attends to whom. Index bookkeeping, no features.

A *unit* is a 2x2 block of patches, the smallest thing that is kept, merged or dropped, because the patch merger turns each into one
token. A video of T frame pairs with H x W units each has N = T*H*W units, in raster order, frame pair after frame pair (Hugging
Face's order). A *row* is a unit that is still computed. It has the place of one unit (`unit`) and may represent many
(`owner`). Everything else follows from these two.

Rows always lie in *window order*: by frame pair, then by window of 4x4 units, then in raster order. So windows and frame pairs are
runs of neighbouring rows.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F

from evoprune.pruning.indices import tally, true_indices

Scope = Literal["window", "pair"]
Reach = Literal["place", "window", "pair", "clip"]
WIDTH = {reach: width for width, reach in enumerate(("place", "window", "pair", "clip"))}


@dataclass(frozen=True)
class Geometry:
    """A frame pair of H x W units cut into windows of `side` x `side` units (112 pixels are 4 units)."""

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
    """The geometry of `height` x `width` units, made once for a device; its tensors live on torch's default device."""
    return Geometry(height, width, side)


@dataclass(frozen=True)
class TokenLayout:
    """The live rows of some frame pairs.

    Attributes:
        geometry: of one frame pair.
        pairs: how many frame pairs there are.
        unit: int64 `[R]`, the unit whose place each row has; in window order.
        owner: int64 `[N]`, the row that represents each unit, or -1 for a dropped one. Values from R on are rows of earlier frame
            pairs, of which only keys and values are left: R + p for the one that was last encoded at place p.
        reach: how far apart a unit and its owner may be: in the same place, in one window or frame pair, or anywhere in the clip.
            Groups at least that wide contain all rows that matter to them.
        counts: rows of each frame pair, where the host knows them.
    """

    geometry: Geometry
    pairs: int
    unit: torch.Tensor
    owner: torch.Tensor
    reach: Reach = "place"
    counts: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        return len(self.unit)

    @cached_property
    def size(self) -> torch.Tensor:
        """int64 `[R]`: how many units each row represents; without references to earlier frame pairs."""
        sizes = torch.zeros(self.rows + 1, dtype=torch.int64)
        row = torch.where(self.owner >= 0, self.owner, self.rows).clamp(max=self.rows)
        return sizes.scatter_add_(0, row, torch.ones_like(row))[:-1]

    @cached_property
    def per_pair(self) -> tuple[int, ...]:
        """Rows of each frame pair; waits for the device only if `counts` does not say."""
        return self.counts or tuple(tally(self.group_of(self.unit, "pair"), self.pairs).tolist())

    def longest(self, scope: Scope) -> int:
        """At most how many rows a group has, as far as the host knows."""
        most = self.geometry.largest_window if scope == "window" else self.geometry.units
        return min(max(self.per_pair), most)

    @cached_property
    def place(self) -> torch.Tensor:
        """int64 `[R]`: raster index of each row inside its frame pair."""
        return self.unit % self.geometry.units

    def group_count(self, scope: Scope) -> int:
        """Number of windows or frame pairs."""
        return self.pairs * (self.geometry.windows if scope == "window" else 1)

    def group_of(self, unit: torch.Tensor, scope: Scope) -> torch.Tensor:
        """The window or frame pair of each of `unit` (int64, any shape), numbered over all frame pairs."""
        pair = unit // self.geometry.units
        if scope == "window":
            return pair * self.geometry.windows + self.geometry.window[unit % self.geometry.units]
        return pair


def window_order(geo: Geometry, pairs: int, alive: torch.Tensor | None = None) -> torch.Tensor:
    """int64 `[R]`: the units of some frame pairs in window order; only those of `alive` (bool `[T, H*W]`), if given."""
    units = torch.arange(pairs)[:, None] * geo.units + geo.order
    return units.flatten() if alive is None else units[alive[:, geo.order]]


def full_layout(geo: Geometry, pairs: int) -> TokenLayout:
    """Every unit is a row of its own."""
    unit = window_order(geo, pairs)
    owner = torch.empty_like(unit)
    owner[unit] = torch.arange(len(unit))
    return TokenLayout(geo, pairs, unit, owner, "place", (geo.units,) * pairs)


def referring_layout(geo: Geometry, source: torch.Tensor) -> TokenLayout:
    """Some units are rows; the others have a row of the same place in an earlier frame pair as their owner.

    Args:
        source: int64 `[T, H*W]` on the CPU: the frame pair that has the row of each unit, its own number or a lower one; below 0 a
            frame pair before these.
    """
    pairs = len(source)
    alive = source == torch.arange(pairs)[:, None]
    unit = window_order(geo, pairs, alive)
    rows = len(unit)
    number = torch.zeros(pairs * geo.units, dtype=torch.int64)
    number[unit] = torch.arange(rows)
    place = torch.arange(geo.units)
    owner = torch.where(source >= 0, number[source.clamp(min=0) * geo.units + place], rows + place).flatten()
    counts = tuple(alive.sum(1).tolist())
    return TokenLayout(geo, pairs, unit, owner, "place" if bool(alive.all()) else "clip", counts)


def selected_layout(
    geo: Geometry, pairs: int, kept: torch.Tensor, owner: torch.Tensor
) -> tuple[TokenLayout, torch.Tensor]:
    """Some units are rows, and each of the others has one of them as its owner, anywhere in the clip.

    Args:
        kept: int64 `[K]`, ascending: the units that are rows.
        owner: int64 `[T * H*W]`, indices into `kept`, -1 for a unit that is dropped.

    Returns:
        The layout; and int64 `[K]`, which of `kept` each of its rows is.
    """
    place = geo.order.argsort()  # where each place comes in window order
    order = (kept // geo.units * geo.units + place[kept % geo.units]).argsort()
    row = torch.where(owner >= 0, order.argsort()[owner.clamp(min=0)], -1)
    return TokenLayout(geo, pairs, kept[order], row, "clip"), order


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
            rows without units, whose `unit` is the first after the last frame pair, so that they form a group of their own.
        counts: rows of each frame pair, where known.
    """
    stays = into == torch.arange(len(into))
    rows = int(stays.sum()) if rows is None else rows
    number = (stays.cumsum(0) - 1).clamp(max=rows - 1)
    owner = torch.where(layout.owner >= 0, number[into][layout.owner.clamp(min=0)], -1)
    reach = max(scope, layout.reach, key=WIDTH.get)
    nowhere = layout.pairs * layout.geometry.units
    unit = torch.where(torch.arange(rows) < stays.sum(), layout.unit[true_indices(stays, rows)], nowhere)
    return TokenLayout(layout.geometry, layout.pairs, unit, owner, reach, counts)


@dataclass(frozen=True)
class Groups:
    """Windows or frame pairs as attention sees them: each with its query rows and its list of key/value rows.

    Query rows of a group are neighbours: `start[g] : start[g] + length[g]`. A list that is not `exact` has what a device can
    compute without waiting: also groups without rows, and unused keys after the last group's.

    Attributes:
        start, length: int64 `[G]`.
        consecutive: the keys are exactly the query rows (plain attention); then `keys` is simply all rows.
        keys: int64 `[sum of key_length, or more]`, rows, group after group: its own, and rows elsewhere that own some of its units.
        key_length: int64 `[G]`.
        count: int64, like `keys`: how many of the group's units each key row represents.
        near: bool, like `keys`: whether the row is one of the group's own frame pair; None where all are.
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
    length = tally(layout.group_of(layout.unit, scope), layout.group_count(scope))
    make = _own_groups if WIDTH[layout.reach] <= WIDTH[scope] else _owner_groups
    groups = make(layout, scope, length)
    return _trimmed(groups) if exact else groups


def _own_groups(layout: TokenLayout, scope: Scope, length: torch.Tensor) -> Groups:
    """Groups whose keys are their own rows."""
    geo, longest = layout.geometry, layout.longest(scope)
    if scope == "window":
        even = layout.reach == "place" and geo.windows * geo.largest_window == geo.units
    else:
        even = min(layout.per_pair) == longest
    start, keys = length.cumsum(0) - length, torch.arange(layout.rows)
    return Groups(start, length, True, keys, length, layout.size, (longest, longest), even)


def _owner_groups(layout: TokenLayout, scope: Scope, length: torch.Tensor) -> Groups:
    """Groups whose keys are all rows that own some of their units, wherever those rows are.

    A row owns the unit whose place it has, so its own group lists it.
    """
    geo, total = layout.geometry, layout.group_count(scope)
    units, rows = len(layout.owner), layout.rows + geo.units
    group = layout.group_of(torch.arange(units), scope)
    asked = (layout.owner >= 0) & (length[group] > 0)  # a group without query rows asks nothing
    unused = total * rows
    pairs = torch.where(asked, group * rows + layout.owner, unused).sort().values  # (group, row that owns a unit of it)
    new = torch.cat([torch.ones(1, dtype=torch.bool), pairs[1:] != pairs[:-1]])
    slot = torch.where(pairs < unused, new.cumsum(0) - 1, units)
    keys = torch.full((units + 1,), unused, dtype=torch.int64).scatter_(0, slot, pairs)[:units]
    key_length = tally(keys // rows, total + 1)[:total]
    count = tally(slot, units + 1)[:units]
    longest_keys, near = geo.largest_window if scope == "window" else geo.units, None
    if layout.reach == "clip":
        pair = F.pad(layout.group_of(layout.unit, "pair"), (0, geo.units), value=-1)
        near = pair[keys % rows] == keys // rows // (total // layout.pairs)
    start, longest = length.cumsum(0) - length, (layout.longest(scope), longest_keys)
    return Groups(start, length, False, keys % rows, key_length, count, longest, False, near)


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
