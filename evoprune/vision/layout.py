"""Which rows the encoder computes, which units they stand for, and who attends to whom. Index bookkeeping, no features.

A *unit* is a 2x2 block of patches, the smallest thing that is kept, merged or dropped, because the patch merger turns each
into one token. A video of T grids with H x W units each has N = T*H*W units, numbered grid after grid in raster order
(Hugging Face's order). A *row* is a unit that is still being computed. It sits at the place of one unit, its `home`, and
may stand for many: `owner` says which row stands for each unit. Everything else follows from these two.

Rows always lie in *window order*: by grid, then by 4x4-unit window, then in raster order, so that both windows and grids are
runs of neighbouring rows.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch

Scope = Literal["window", "grid"]


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
        owner: int64 `[N]`, the row that stands for each unit, or -1 for a dropped one.
        reach: how far apart a unit and its owner may be: `None` in the same place, "window" inside one window, "grid" inside
            one grid. Groups at least that wide contain all rows that matter to them.
    """

    geometry: Geometry
    grids: int
    home: torch.Tensor
    owner: torch.Tensor
    reach: Scope | None = None

    @property
    def rows(self) -> int:
        return len(self.home)

    @cached_property
    def size(self) -> torch.Tensor:
        """int64 `[R]`: how many units each row stands for."""
        return torch.bincount(self.owner[self.owner >= 0], minlength=self.rows)

    @cached_property
    def place(self) -> torch.Tensor:
        """int64 `[R]`: raster index of each row inside its grid."""
        return self.home % self.geometry.units

    def group_count(self, scope: Scope) -> int:
        return self.grids * (self.geometry.windows if scope == "window" else 1)

    def group_of(self, unit: torch.Tensor, scope: Scope) -> torch.Tensor:
        """The window or grid in which each of `unit` (int64, any shape) lies, numbered over all grids."""
        grid = unit // self.geometry.units
        if scope == "grid":
            return grid
        return grid * self.geometry.windows + self.geometry.window[unit % self.geometry.units]


def full_layout(geo: Geometry, grids: int) -> TokenLayout:
    """Every unit is a row of its own."""
    home = (torch.arange(grids)[:, None] * geo.units + geo.order).flatten()
    owner = torch.empty_like(home)
    owner[home] = torch.arange(len(home))
    return TokenLayout(geo, grids, home, owner)


def merged_layout(layout: TokenLayout, into: torch.Tensor, scope: Scope) -> TokenLayout:
    """The layout after every row r has gone into row `into[r]`; a row that stays has `into[r] == r`.

    Args:
        into: int64 `[R]`; where a row goes must itself stay.
        scope: the groups inside which rows were merged.
    """
    stays = into == torch.arange(len(into))
    number = stays.cumsum(0) - 1
    owner = torch.where(layout.owner >= 0, number[into[layout.owner.clamp(min=0)]], -1)
    reach = "grid" if "grid" in (scope, layout.reach) else "window"
    return TokenLayout(layout.geometry, layout.grids, layout.home[stays], owner, reach)


@dataclass(frozen=True)
class Groups:
    """Windows or grids as attention sees them: each with its query rows and its list of key/value rows.

    Only groups with query rows are listed. Query rows of a group are neighbours: `start[g] : start[g] + length[g]`.

    Attributes:
        start, length: int64 `[G]`.
        consecutive: the keys are exactly the query rows (plain attention); then `keys` is simply all rows.
        keys: int64 `[sum of key_length]`, rows, group after group: its own, and rows elsewhere that own some of its units.
        key_length: int64 `[G]`.
        count: int64, like `keys`: how many of the group's units each key row stands for.
    """

    start: torch.Tensor
    length: torch.Tensor
    consecutive: bool
    keys: torch.Tensor
    key_length: torch.Tensor
    count: torch.Tensor


def attention_groups(layout: TokenLayout, scope: Scope) -> Groups:
    """Who attends to whom in a layer whose attention is limited to `scope`."""
    total = layout.group_count(scope)
    home = layout.group_of(layout.home, scope)
    length = torch.bincount(home, minlength=total)
    start = length.cumsum(0) - length
    if layout.reach is None or layout.reach == "window" or scope == "grid":
        keys, key_length, count = torch.arange(layout.rows), length, layout.size
        consecutive = True
    else:
        # Pairs (group, row that stands for some of its units), and how many units that are. A row whose own unit went
        # elsewhere cannot be: a row always owns its home, so its home group lists it.
        held = layout.owner >= 0
        group = layout.group_of(torch.arange(len(layout.owner))[held], scope)
        pairs, count = torch.unique(group * layout.rows + layout.owner[held], return_counts=True)
        keys, of = pairs % layout.rows, pairs // layout.rows
        asked = length[of] > 0  # a group without query rows asks nothing
        keys, count, of = keys[asked], count[asked], of[asked]
        key_length = torch.bincount(of, minlength=total)
        consecutive = False
    used = length > 0
    return Groups(start[used], length[used], consecutive, keys, key_length[used], count)
