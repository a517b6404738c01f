"""The rows that the encoder computes, the units that they represent, and the groups in which they attend. Indices, no features.

A *unit* is a 2x2 block of patches. Units are kept, merged or dropped whole, because the patch merger turns each into one
token. A video of T frame pairs with H x W units each has N = T*H*W units, in raster order, frame pair after frame pair
(Hugging Face's order). A *row* is a unit that is still computed. It has the place of one unit (`unit`) and may represent many
(`unit_to_row`). Everything else follows from these two.

Rows are always in *window order*: by frame pair, then by window of 4x4 units, then in raster order. So windows and frame
pairs are runs of neighbouring rows.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F

from evoprune.backend import devices
from evoprune.methods.types import arange_on, bincount_fixed, nonzero_fixed
from evoprune.model.config import PATCHES

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
        y = arange_on(self.height, self.device) // self.side
        x = arange_on(self.width, self.device) // self.side
        return (y[:, None] * -(-self.width // self.side) + x).flatten()

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 `[H*W]`: the places in window order."""
        return self.window.argsort(stable=True)


@lru_cache(maxsize=64)
def geometry(height: int, width: int, side: int = 4, device: str = "cpu") -> Geometry:
    """Return the geometry of `height` x `width` units, cached for each device."""
    return Geometry(height, width, side, device)


@dataclass(frozen=True)
class TokenLayout:
    """The live rows of frame pairs."""

    geometry: Geometry  # of one frame pair
    pairs: int
    unit: torch.Tensor  # int64 `[R]`, the unit whose place each row has, in window order
    # int64 `[N]`, the row that represents each unit, or -1 for a dropped one. R + p is a row from before these frame pairs at place
    # p, of which only keys and values are there (live/segments.py).
    unit_to_row: torch.Tensor
    # Where the row of a unit may be: at the same place, in the same window or frame pair, or anywhere in the clip. A group of at
    # least this scope contains all rows of its units.
    reach: Reach = "place"
    counts: tuple[int, ...] | None = None  # rows of each frame pair; None where only the device knows them
    complete: bool = False  # whether every unit is known to have a row

    @property
    def rows(self) -> int:
        return len(self.unit)

    @cached_property
    def size(self) -> torch.Tensor:
        """int64 `[R]`: the cluster size of each row; rows from before are left out."""
        sizes = torch.zeros(self.rows + 1, dtype=torch.int64, device=self.unit_to_row.device)
        row = torch.where(self.unit_to_row >= 0, self.unit_to_row, self.rows).clamp(max=self.rows)
        return sizes.scatter_add_(0, row, torch.ones_like(row))[:-1]

    @cached_property
    def per_pair(self) -> tuple[int, ...]:
        """Rows of each frame pair; waits for an accelerator if `counts` is None."""
        return self.counts or tuple(bincount_fixed(self.group_of(self.unit, "pair"), self.pairs).tolist())

    def longest(self, scope: Scope) -> int:
        """Return an upper bound of the rows of a group, computed without waiting."""
        limit = self.geometry.largest_window if scope == "window" else self.geometry.units
        known = self.counts or devices.exact_shapes(self.unit.device)
        return min(max(self.per_pair) if known else self.rows, limit)

    def mixes(self, scope: Scope) -> bool:
        """Return whether a group of `scope` may have units that rows of other groups own."""
        return WIDTH[self.reach] > WIDTH[scope]

    def row_groups(self, scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 `[R]`, the group of each row; int64 `[G + 1]`, the first row of each group, and the end of the last one."""
        group = self.group_of(self.unit, scope)
        return group, torch.searchsorted(group, arange_on(self.group_count(scope) + 1, group.device))

    def group_units(self, scope: Scope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`group_units` of these frame pairs."""
        return group_units(self.geometry, self.pairs, scope)

    @cached_property
    def pair_of_row(self) -> torch.Tensor:
        """int64 `[R + P]`: the frame pair of each row, -1 for those from before."""
        return F.pad(self.unit // self.geometry.units, (0, self.geometry.units), value=-1)

    @cached_property
    def place(self) -> torch.Tensor:
        """int64 `[R]`: raster index of each row inside its frame pair."""
        return self.unit % self.geometry.units

    def group_count(self, scope: Scope) -> int:
        """Number of windows or frame pairs."""
        return self.pairs * (self.geometry.windows if scope == "window" else 1)

    def group_of(self, unit: torch.Tensor, scope: Scope) -> torch.Tensor:
        """Return the number of the window or frame pair of each unit (int64, any shape), counted over all frame pairs."""
        return group_table(self.geometry, self.pairs, scope)[unit]


@lru_cache(maxsize=64)
def group_table(geo: Geometry, pairs: int, scope: Scope) -> torch.Tensor:
    """int64 `[T * H*W + 1]`: the number of the window or frame pair of each unit, and of padding, which is after the last."""
    pair = arange_on(pairs + 1, geo.device)
    place = torch.zeros_like(geo.window)
    if scope == "window":
        pair = pair * geo.windows
        place = geo.window
    return (pair[:, None] + place).flatten()[: pairs * geo.units + 1].clone()


@lru_cache(maxsize=64)
def order_tables(geo: Geometry, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 `[T * H*W]`, twice: all units in window order, and the rank of each unit in it."""
    order = (arange_on(pairs, geo.device)[:, None] * geo.units + geo.order).flatten()
    return order, order.argsort()


def window_order(geo: Geometry, pairs: int, alive: torch.Tensor | None = None, count: int = 0) -> torch.Tensor:
    """int64 `[R]`: the units of `pairs` frame pairs in window order; with `alive` (bool `[T, H*W]`) those `count`."""
    units, _ = order_tables(geo, pairs)
    return units if alive is None else units[alive.flatten()[units].argsort(descending=True, stable=True)[:count]]


def full_layout(geo: Geometry, pairs: int) -> TokenLayout:
    """Return the layout in which every unit is a row."""
    return TokenLayout(geo, pairs, *order_tables(geo, pairs), "place", (geo.units,) * pairs, True)


def referring_layout(geo: Geometry, source: torch.Tensor, counts: tuple[int, ...], unit: torch.Tensor) -> TokenLayout:
    """Return the layout with reuse: some units are rows, and each other unit is owned by a row at its place in an earlier frame
    pair.

    `source`: int64 `[pairs, H*W]`, the frame pair whose row represents each unit, counted from the first of these; a negative
    number is one before them. `counts`, `unit`: as in the layout.
    """
    pairs = len(source)
    rows = sum(counts)
    number = torch.zeros(pairs * geo.units, dtype=torch.int64, device=source.device)
    number[unit] = arange_on(rows, source.device)
    place = arange_on(geo.units, source.device)
    unit_to_row = torch.where(source >= 0, number[source.clamp(min=0) * geo.units + place], rows + place).flatten()
    return TokenLayout(geo, pairs, unit, unit_to_row, "place" if rows == pairs * geo.units else "clip", counts, True)


def merged_layout(
    layout: TokenLayout,
    into: torch.Tensor,
    scope: Scope,
    rows: int | None = None,
    counts: tuple[int, ...] | None = None,
) -> TokenLayout:
    """Return the layout after every row r has merged into row `into[r]` (int64 `[R]`), itself if it stays, inside groups of
    `scope`.

    Args:
        rows: number of rows in the result. Default: the rows that stay, whose count synchronises. If it is more, the last rows are
            padding: they own no unit, and their `unit` is the first after the last frame pair, so they form a group of their own.
        counts: rows of each frame pair, if known.
    """
    stays = into == arange_on(len(into), into.device)
    rows = int(stays.sum()) if rows is None else rows
    number = (stays.cumsum(0) - 1).clamp(max=rows - 1)
    unit_to_row = torch.where(layout.unit_to_row >= 0, number[into][layout.unit_to_row.clamp(min=0)], -1)
    reach = max(scope, layout.reach, key=WIDTH.get)
    nowhere = layout.pairs * layout.geometry.units
    unit = torch.where(arange_on(rows, into.device) < stays.sum(), layout.unit[nonzero_fixed(stays, rows)], nowhere)
    return TokenLayout(layout.geometry, layout.pairs, unit, unit_to_row, reach, counts, layout.complete)


@lru_cache(maxsize=64)
def group_units(geo: Geometry, pairs: int, scope: Scope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a device needs of all units of each window or frame pair, without reading a value.

    Their numbers, int64 `[G, widest]`, padded with the first after the last frame pair; int64 `[T * H*W]`, where in this flattened
    table they are; and int32 `[G + 1]`, a zero and the ends of all groups, counted in patches.
    """
    order, _ = order_tables(geo, pairs)
    group = group_table(geo, pairs, scope)[order]
    total = pairs * (geo.windows if scope == "window" else 1)
    widest = geo.largest_window if scope == "window" else geo.units
    length = bincount_fixed(group, total)
    ends = F.pad(length.cumsum(0), (1, 0))
    slot = group * widest + arange_on(len(order), order.device) - ends[group]
    table = torch.full((total * widest,), len(order), dtype=torch.int64, device=order.device).scatter_(0, slot, order)
    return table.view(total, widest), slot, (ends * PATCHES).int()


@dataclass(frozen=True)
class Groups:
    """Windows or frame pairs that have rows, as attention reads them on a CPU, each with its query rows and its key rows.

    Query rows of a group are neighbours: `start[g] : start[g] + length[g]`.
    """

    start: torch.Tensor  # int64 `[G]`
    length: torch.Tensor  # int64 `[G]`
    consecutive: bool  # whether the keys of each group are its query rows; then `keys` is all rows
    # int64 `[sum of key_length]`, key rows, group after group: its own, and other rows that own some of its units
    keys: torch.Tensor
    key_length: torch.Tensor  # int64 `[G]`
    count: torch.Tensor  # int64, like `keys`: how many of the group's units each key row represents


def attention_groups(layout: TokenLayout, scope: Scope) -> Groups:
    """Return the groups of a layer whose attention is limited to `scope`; synchronises."""
    length = bincount_fixed(layout.group_of(layout.unit, scope), layout.group_count(scope))
    start = length.cumsum(0) - length
    used = length > 0
    start = start[used]
    own = length[used]
    if not layout.mixes(scope):  # the keys of a group are its own rows
        return Groups(start, own, True, arange_on(layout.rows, length.device), own, layout.size)
    # All rows that own some of its units, in any frame pair: a row owns the unit whose place it has, so its own are among them.
    rows = layout.rows + layout.geometry.units
    group = group_table(layout.geometry, layout.pairs, scope)[:-1]
    asked = (layout.unit_to_row >= 0) & used[group]  # a group without query rows needs no keys
    both, count = (group * rows + layout.unit_to_row)[asked].unique(return_counts=True)
    key_length = bincount_fixed(both // rows, layout.group_count(scope))[used]
    return Groups(start, own, False, both % rows, key_length, count)
