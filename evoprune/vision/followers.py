"""Rows that are dropped inside the tower and come back at its end: until then they follow similar rows that stay.

After some layers (`Stage.first_layer`) each frame pair keeps the rows that the last layer changed most. A dropped row
remembers its state and the kept rows nearest to it. Until `SetAside.until` it moves as these move on average, and it
stays a key and a value of attention, but no MLP computes it. Then the kept rows go on alone. After the last layer all
dropped rows come back, moved in the same way. This is IPCV (arXiv 2512.18747); methods/ipcv.py says what is adapted.

Every shape follows from the plan, so nothing waits for a GPU.
"""

import torch

from evoprune.pruning.encoder_plan import Stage
from evoprune.pruning.indices import ascending
from evoprune.pruning.score import snap
from evoprune.vision.layout import Geometry, Scope, TokenLayout
from evoprune.vision.reduction import Reduction


class Followers(Reduction):
    """Of one chunk, of which every unit is a row.

    Args:
        stage: reduces by a `SetAside`.
        depth: number of layers.
    """

    size_bias = False

    def __init__(self, stage: Stage, depth: int):
        self._first, self._plan, self._depth = stage.first_layer, stage.reduce, depth
        self._earlier: torch.Tensor | None = None  # the rows before the layer whose changes decide
        self._saved: torch.Tensor | None = None  # [R, 4, hidden], the rows after that layer

    def begin(self, x: torch.Tensor) -> None:
        if self._first == 1:
            self._earlier = x

    def computed(self, layer: int, layout: TokenLayout) -> int:
        """Rows in `layer`: without followers, of which attention computes keys and values."""
        return layout.rows if layer < self._first else layout.pairs * self._plan.left

    def active(self, layer: int) -> torch.Tensor | None:
        return self._kept if self._first <= layer < self._plan.until else None

    def acts(self, layer: int, layout: TokenLayout) -> bool:
        return self._first - 1 <= layer + 1 <= self._plan.until or layer + 1 == self._depth

    def after(
        self,
        layer: int,
        scope: Scope,
        x: torch.Tensor,
        layout: TokenLayout,
        keys: torch.Tensor | None,
        received: torch.Tensor | None,
    ) -> tuple[torch.Tensor, TokenLayout]:
        plan, done = self._plan, layer + 1
        if done < self._first:
            self._earlier = x
            return x, layout
        if done == self._first:
            self._divide(x, layout)
        elif done <= plan.until:
            x = self._moved(x[self._kept])
        if done == self._depth:
            return self.all_rows(x), self._layout
        return (x[self._kept], self._layout_of_kept) if done == plan.until else (x, layout)

    def all_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._saved is None or len(x) == len(self._saved) else self._moved(x)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """A dropped row has the mean of the rows that it follows."""
        if self._saved is None or len(values) == len(self._saved):
            return values
        made = values.new_empty(len(self._saved), *values.shape[1:])
        made[self._kept] = values
        made[self._dropped] = self._mean_of_near(values).to(values.dtype)
        return made

    def _divide(self, x: torch.Tensor, layout: TokenLayout) -> None:
        """Decides which rows stay, and whom the others follow."""
        geo, pairs, keep = layout.geometry, layout.pairs, self._plan.left
        rows = x.flatten(1).float().view(pairs, geo.units, -1)
        change = (rows - self._earlier.flatten(1).float().view_as(rows)).norm(dim=2)
        change = snap(change / change.amax(1, keepdim=True).clamp(min=1e-30))
        rank = geo.order.argsort()  # of each place in window order
        order = rank[change[:, rank].argsort(dim=1, descending=True, stable=True)]  # ties by place
        kept, dropped = order[:, :keep].sort().values, order[:, keep:].sort().values
        self._near = nearest_rows(rows, kept, dropped, self._plan.neighbours) + (
            ascending(pairs, x.device)[:, None, None] * keep
        )
        first = ascending(pairs, x.device)[:, None] * geo.units
        self._near = self._near.flatten(0, 1)
        self._kept, self._dropped = (kept + first).flatten(), (dropped + first).flatten()
        self._saved, self._earlier, self._layout = x, None, layout
        self._layout_of_kept = kept_layout(geo, layout, self._kept, keep)

    def _moved(self, kept: torch.Tensor) -> torch.Tensor:
        """All rows `[R, 4, hidden]`, from the kept ones: a dropped row has moved as the rows that it follows, on average."""
        made = self._saved.index_copy(0, self._kept, kept)
        move = self._mean_of_near(kept.float() - self._saved[self._kept].float())
        return made.index_copy_(0, self._dropped, (self._saved[self._dropped].float() + move).to(made.dtype))

    def _mean_of_near(self, values: torch.Tensor) -> torch.Tensor:
        """float32 `[dropped, ...]`: for each dropped row the mean of `values` (`[kept, ...]`) over the rows that it follows."""
        return sum(values[near].float() for near in self._near.unbind(1)) / self._near.shape[1]


def nearest_rows(rows: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor, count: int) -> torch.Tensor:
    """int64 `[B, d, min(count, k)]`: indices in `kept` of the rows nearest to each dropped row, the nearest first; ties by index.

    Args:
        rows: float32 `[B, n, D]`.
        kept: int64 `[B, k]`, dropped: int64 `[B, d]`: indices of rows.
    """
    wide = (-1, -1, rows.shape[2])
    some, others = (rows.gather(1, index[:, :, None].expand(wide)) for index in (dropped, kept))
    distance = torch.cdist(some, others)
    longest = distance.flatten(1).amax(1)[:, None, None] if distance.numel() else distance.new_ones(())
    order = snap(distance / longest.clamp(min=1e-30)).argsort(dim=2, stable=True)
    return order[:, :, :count]


def kept_layout(geo: Geometry, layout: TokenLayout, kept: torch.Tensor, each: int) -> TokenLayout:
    """The layout of some rows of a full layout (int64 `[k]`, ascending), `each` of every frame pair; the others own nothing."""
    unit = layout.unit[kept]
    owner = torch.full_like(layout.owner, -1)
    owner[unit] = ascending(len(kept), unit.device)
    return TokenLayout(geo, layout.pairs, unit, owner, "window", (each,) * layout.pairs)
