"""Index tables that map units to windows and frame pairs, and raster order to window order.

A *unit* is a 2x2 block of patches. Units are always kept, merged, or dropped as a whole because the patch merger turns each unit
into one token. A video of T frame pairs with H x W units each has N = T*H*W units. In Hugging Face's order, units are in raster
order within each frame pair, one frame pair after another. In *window order*, units are sorted by frame pair, then by window (4x4
units), and finally in raster order, so each window and each frame pair is a run of consecutive units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F

from evoprune.methods import arange_on
from evoprune.model import PATCHES

Scope = Literal["window", "pair"]


@dataclass(frozen=True)
class Geometry:
    """The geometry of a frame pair: H x W units in windows of `side` x `side` units. Tensors are on `device`."""

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
        """The window at each position in a frame pair, int64 `[H*W]`. Windows are numbered in raster order."""
        y = arange_on(self.height, self.device) // self.side
        x = arange_on(self.width, self.device) // self.side
        return (y[:, None] * -(-self.width // self.side) + x).flatten()

    @cached_property
    def order(self) -> torch.Tensor:
        """The raster indices of the positions in a frame pair, in window order, int64 `[H*W]`."""
        return self.window.argsort(stable=True)

    def groups(self, scope: Scope) -> int:
        """Return the number of groups per frame pair: the number of windows, or 1 if the scope is the frame pair itself."""
        return self.windows if scope == "window" else 1

    def largest(self, scope: Scope) -> int:
        """Return the number of units in the largest group for this scope."""
        return self.largest_window if scope == "window" else self.units

    def even(self, scope: Scope) -> bool:
        """Return True if all groups for this scope have the same number of units, which is always true for frame pairs."""
        return self.groups(scope) * self.largest(scope) == self.units


@lru_cache(maxsize=64)
def geometry(height: int, width: int, side: int = 4, device: str = "cpu") -> Geometry:
    """Return the geometry of a frame pair with `height` x `width` units. It is cached, so its tables are computed only once."""
    return Geometry(height, width, side, device)


@lru_cache(maxsize=64)
def group_table(geo: Geometry, pairs: int, scope: Scope) -> torch.Tensor:
    """Return each unit's group (window or frame pair), int64 `[T * H*W + 1]`. The last entry is an extra group for padding."""
    pair = arange_on(pairs + 1, geo.device)
    place = torch.zeros_like(geo.window)
    if scope == "window":
        pair = pair * geo.windows
        place = geo.window
    return (pair[:, None] + place).flatten()[: pairs * geo.units + 1].clone()


@lru_cache(maxsize=64)
def order_tables(geo: Geometry, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the units in window order, and each unit's rank in that order, both as int64 `[T * H*W]`."""
    order = (arange_on(pairs, geo.device)[:, None] * geo.units + geo.order).flatten()
    return order, order.argsort()


def window_order(geo: Geometry, pairs: int, alive: torch.Tensor | None = None, count: int = 0) -> torch.Tensor:
    """Return the units of `pairs` frame pairs in window order, int64 `[R]`.

    Args:
        alive: bool `[T, H*W]`, True for the units to include. None includes all units.
        count: The number of True entries in `alive`.
    """
    units, _ = order_tables(geo, pairs)
    if alive is None:
        return units
    there = alive.flatten()[units]
    slot = there.cumsum(0).mul_(there)  # 0 for all other units
    return units.new_zeros(count + 1).scatter_(0, slot, units)[1:]


@lru_cache(maxsize=64)
def group_units(geo: Geometry, pairs: int, scope: Scope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a table of the units in each window or frame pair, without synchronizing the device.

    Returns:
        int64 `[G, widest]`, the units in each group, padded with the total number of units.
        int64 `[T * H*W]`, each unit's position in the flattened table. Units are in window order.
        int32 `[G + 1]`, the offsets of the groups, counted in patches. The first offset is 0.
    """
    order, _ = order_tables(geo, pairs)
    group = group_table(geo, pairs, scope)[order]
    total = pairs * geo.groups(scope)
    widest = geo.largest(scope)
    length = bincount_fixed(group, total)
    ends = F.pad(length.cumsum(0), (1, 0))
    slot = group * widest + arange_on(len(order), order.device) - ends[group]
    table = torch.full((total * widest,), len(order), dtype=torch.int64, device=order.device).scatter_(0, slot, order)
    return table.view(total, widest), slot, (ends * PATCHES).int()


def bincount_fixed(index: torch.Tensor, bins: int) -> torch.Tensor:
    """Count the occurrences of each number below `bins` in `index` (int64 `[n]`), without synchronizing. Returns int64 `[bins]`."""
    return index.new_zeros(bins).scatter_add_(0, index, torch.ones_like(index))


def runs(start: torch.Tensor, length: torch.Tensor, longest: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row indices of B runs of consecutive rows as a padded batch. Padding repeats each run's last row.

    Args:
        start, length: int64 `[B]`, each run's first row and length, which may be 0.
        longest: An upper bound on `length`.
        rows: The total number of rows. Indices are clamped to stay below it.

    Returns:
        int64 `[B, longest]`, the row indices, and bool `[B, longest]`, which is False for padding.
    """
    step = arange_on(longest, start.device)
    last = (length - 1).clamp(min=0)[:, None]
    return (start[:, None] + torch.minimum(step, last)).clamp(max=rows - 1), step < length[:, None]


def cat(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors. A single tensor is returned without a copy."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
