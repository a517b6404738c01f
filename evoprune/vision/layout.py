"""Index tables for units: the windows of a frame pair, and the order of units by windows.

A *unit* is a 2x2 block of patches. Units are kept, merged or dropped whole, because the patch merger turns a unit into one
token. A video of T frame pairs with H x W units has N = T*H*W units, in raster order, frame pair after frame pair
(Hugging Face's order). In *window order*, they are sorted by frame pair, then by window of 4x4 units, then in raster order, so that
each window and each frame pair is a run of consecutive units.
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
    """A frame pair of H x W units, cut into windows of `side` x `side` units (4 units are 112 pixels). Tensors are on `device`."""

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
        """int64 `[H*W]`: the window that each place belongs to, numbered in raster order."""
        y = arange_on(self.height, self.device) // self.side
        x = arange_on(self.width, self.device) // self.side
        return (y[:, None] * -(-self.width // self.side) + x).flatten()

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 `[H*W]`: the places, sorted in window order."""
        return self.window.argsort(stable=True)

    def groups(self, scope: Scope) -> int:
        """Return the number of groups per frame pair: its windows, or 1 for scope "pair"."""
        return self.windows if scope == "window" else 1

    def largest(self, scope: Scope) -> int:
        """Return the number of units in the largest group: the largest window, or a frame pair."""
        return self.largest_window if scope == "window" else self.units

    def even(self, scope: Scope) -> bool:
        """Return True if all groups have the same number of units, which is always the case for frame pairs."""
        return self.groups(scope) * self.largest(scope) == self.units


@lru_cache(maxsize=64)
def geometry(height: int, width: int, side: int = 4, device: str = "cpu") -> Geometry:
    """Return the geometry of `height` x `width` units, cached per device."""
    return Geometry(height, width, side, device)


@lru_cache(maxsize=64)
def group_table(geo: Geometry, pairs: int, scope: Scope) -> torch.Tensor:
    """Return each unit's group, int64 `[T * H*W + 1]`. The last entry is for padding, which has a separate group."""
    pair = arange_on(pairs + 1, geo.device)
    place = torch.zeros_like(geo.window)
    if scope == "window":
        pair = pair * geo.windows
        place = geo.window
    return (pair[:, None] + place).flatten()[: pairs * geo.units + 1].clone()


@lru_cache(maxsize=64)
def order_tables(geo: Geometry, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the units in window order and each unit's rank in this order, both int64 `[T * H*W]`."""
    order = (arange_on(pairs, geo.device)[:, None] * geo.units + geo.order).flatten()
    return order, order.argsort()


def window_order(geo: Geometry, pairs: int, alive: torch.Tensor | None = None, count: int = 0) -> torch.Tensor:
    """Return the units of `pairs` frame pairs in window order, int64 `[R]`.

    Args:
        alive: bool `[T, H*W]`, the units to return; None for all.
        count: number of True values in `alive`.
    """
    units, _ = order_tables(geo, pairs)
    if alive is None:
        return units
    there = alive.flatten()[units]
    slot = there.cumsum(0).mul_(there)  # 0 for all other units
    return units.new_zeros(count + 1).scatter_(0, slot, units)[1:]


@lru_cache(maxsize=64)
def group_units(geo: Geometry, pairs: int, scope: Scope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tables of the units in each window or frame pair, without reading values from the device.

    Returns:
        A table of the units in each group, int64 `[G, widest]`, padded with the total number of units; each unit's index in the
        flattened table, int64 `[T * H*W]`, with the units in window order; and the boundaries of the groups, counted in patches,
        int32 `[G + 1]`, starting with 0.
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
    """Count how often each number below `bins` occurs in `index` (int64 `[n]`). Returns int64 `[bins]`."""
    return index.new_zeros(bins).scatter_add_(0, index, torch.ones_like(index))


def runs(start: torch.Tensor, length: torch.Tensor, longest: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return runs of neighboring rows as a padded batch. Padding repeats the last row of a run.

    Args:
        start, length: int64 `[B]`, each run's first row and length. A run may be empty.
        longest: upper bound of the lengths.
        rows: number of rows; all indices stay below it.

    Returns:
        The rows, int64 `[B, longest]`; and a mask, bool `[B, longest]`, which is False for padding.
    """
    step = arange_on(longest, start.device)
    last = (length - 1).clamp(min=0)[:, None]
    return (start[:, None] + torch.minimum(step, last)).clamp(max=rows - 1), step < length[:, None]


def cat(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors. A single tensor is returned without a copy."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
