"""The IPCV method, which sets rows aside inside the vision encoder and restores them after the last layer."""

from dataclasses import dataclass, replace
from math import prod
from typing import Annotated

import torch

from evoprune.contrib.dart import Dart
from evoprune.contrib.shared import Count, Share
from evoprune.methods import EncoderMethod, Grid, SetAside, Stage, TowerShape, arange_on, snap
from evoprune.vision import Hook, Rows


@dataclass(frozen=True)
class Ipcv(EncoderMethod):
    """IPCV (arXiv 2512.18747): sets rows aside, updates them like similar kept rows, and restores them after the last layer.

    After the first `first` fraction of the layers, each frame pair keeps the `keep` fraction of its rows that the latest layer
    changed most. From then on, each dropped row changes by the mean change of its `neighbours` nearest kept rows. Over the next
    `follow` fraction of the layers, dropped rows still serve as keys and values. All rows are restored before the patch merger, so
    meeting the budget requires a selector. The default is DART, as in the paper, and `ipcv+NAME` specifies a different one. With n
    rows per frame pair, finding the nearest rows takes O(N n D) time.

    Differences from the paper: DART runs after the encoder instead of inside the language model.
    """

    name = "ipcv"
    source = "arXiv 2512.18747"
    combines = True
    tokens = Dart()

    keep: Annotated[float, "(0, 1]"] = 0.35  # fraction of the rows to keep
    first: Share = 3 / 32  # fraction of the tower's layers that run before rows are set aside
    follow: Share = 7 / 32  # fraction of the layers in which dropped rows still serve as keys and values
    neighbours: Count = 10  # number of kept rows that each dropped row follows

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        units = prod(grid[1:])
        first = max(1, round(self.first * tower.depth))
        left = max(1, int(self.keep * units))
        if first >= tower.depth or left == units:
            return []
        until = min(first + round(self.follow * tower.depth), tower.depth)
        return [Stage(first, grid[0] * left, Follow(left, until, self.neighbours))]


@dataclass(frozen=True)
class Follow(SetAside):
    """Sets rows aside, and updates each of them by the mean change of its nearest kept rows."""

    until: int  # number of layers after which dropped rows no longer serve as keys and values
    neighbours: int  # number of kept rows that each dropped row follows

    def hook(self, first_layer: int) -> "Followers":
        return Followers(self, first_layer)


class Followers(Hook):
    """A hook that sets aside and restores rows of one video. Every unit of the video must have a row.

    After `Stage.first_layer` layers, each frame pair keeps the rows that the latest layer changed most. For each dropped row, the
    hook stores the row's state and its nearest kept rows. Until `Follow.until`, a dropped row changes by the mean change of these
    kept rows. It still serves as a key and value in attention, but it skips the MLP. Later layers compute only the kept rows. After
    the last layer, all dropped rows are restored and updated in the same way. The hook never synchronizes the GPU, because all
    shapes are known from the plan.
    """

    def __init__(self, plan: Follow, first: int):
        self.active: torch.Tensor | None = None
        self._plan = plan
        self._first = first
        self._earlier: torch.Tensor | None = None  # the rows before the layer that determines which rows to keep

    def __call__(self, done: int, rows: Rows, seen: dict[str, torch.Tensor]) -> Rows:
        if done == self._first - 1:
            self._earlier = rows.values
        elif done == self._first:
            self._divide(rows)
            rows.aside = self
            self.active = self._kept
        elif self._first < done <= self._plan.until:
            rows.values = self._moved(rows.values[self._kept])
        if done == self._plan.until:
            self.active = None
            return self._kept_alone(rows)
        return rows

    def whole(self, rows: Rows) -> Rows:
        if len(rows) == len(self._all.unit):
            return replace(rows, aside=None)
        return replace(
            self._all,
            values=self._moved(rows.values),
            deepstack=self._spread(rows.deepstack),
            given={name: self._spread(value) for name, value in rows.given.items()},
        )

    def _divide(self, rows: Rows) -> None:
        """Decide which rows to keep, and which of the kept rows each dropped row follows."""
        geo = rows.geometry
        pairs = rows.pairs
        keep = self._plan.left
        x = rows.values.flatten(1).float().view(pairs, geo.units, -1)
        change = (x - self._earlier.flatten(1).float().view_as(x)).norm(dim=2)
        change = snap(change / change.amax(1, keepdim=True).clamp(min=1e-30))
        rank = geo.order.argsort()  # rank of each position in window order
        order = rank[change[:, rank].argsort(dim=1, descending=True, stable=True)]  # ties go to the lower position
        kept = order[:, :keep].sort().values
        dropped = order[:, keep:].sort().values
        first = arange_on(pairs, x.device)[:, None]
        near = nearest_rows(x, kept, dropped, self._plan.neighbours)
        self._near = (near + first[:, :, None] * keep).flatten(0, 1)
        self._kept = (kept + first * geo.units).flatten()
        self._dropped = (dropped + first * geo.units).flatten()
        self._all = replace(rows)  # with the current values
        self._earlier = None

    def _kept_alone(self, rows: Rows) -> Rows:
        """Return a copy of `rows` with only the kept rows. All other units have no row in the copy."""
        unit = rows.unit[self._kept]
        unit_to_row = torch.full_like(rows.unit_to_row, -1)
        unit_to_row[unit] = arange_on(len(unit), unit.device)
        return replace(
            rows,
            values=rows.values[self._kept],
            unit=unit,
            unit_to_row=unit_to_row,
            reach="window",
            counts=(self._plan.left,) * rows.pairs,
            complete=False,
        )

    def _moved(self, kept: torch.Tensor) -> torch.Tensor:
        """Return all rows, `[R, 4, hidden]`, after changing each dropped row by the mean change of the kept rows it follows."""
        saved = self._all.values
        moved = saved.index_copy(0, self._kept, kept)
        move = self._mean_of_near(kept.float() - saved[self._kept].float())
        return moved.index_copy_(0, self._dropped, (saved[self._dropped].float() + move).to(moved.dtype))

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Extend `values` from the kept rows to all rows, `[R, ...]`. A dropped row gets the mean over the rows that it follows.

        If `values` already covers all rows, it is returned unchanged.
        """
        rows = len(self._all)
        if len(values) == rows:
            return values
        full = values.new_empty(rows, *values.shape[1:])
        full[self._kept] = values
        full[self._dropped] = self._mean_of_near(values).to(values.dtype)
        return full

    def _mean_of_near(self, values: torch.Tensor) -> torch.Tensor:
        """For each dropped row, average the kept rows' `values` (`[kept, ...]`) over the rows that it follows.

        Returns:
            float32 `[dropped, ...]`.
        """
        return sum(values[near].float() for near in self._near.unbind(1)) / self._near.shape[1]


def nearest_rows(rows: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor, count: int) -> torch.Tensor:
    """Find the nearest kept rows for each dropped row.

    Args:
        rows: float32 `[B, n, D]`, the rows of B frame pairs.
        kept: int64 `[B, k]`, the indices of the kept rows.
        dropped: int64 `[B, d]`, the indices of the dropped rows.
        count: The maximum number of kept rows to find per dropped row.

    Returns:
        int64 `[B, d, min(count, k)]`, indices into `kept`, nearest first. Ties go to the lower index.
    """
    wide = (-1, -1, rows.shape[2])
    dropped_rows, kept_rows = (rows.gather(1, index[:, :, None].expand(wide)) for index in (dropped, kept))
    distance = torch.cdist(dropped_rows, kept_rows)
    longest = distance.flatten(1).amax(1)[:, None, None] if distance.numel() else distance.new_ones(())
    order = snap(distance / longest.clamp(min=1e-30)).argsort(dim=2, stable=True)
    return order[:, :, :count]
