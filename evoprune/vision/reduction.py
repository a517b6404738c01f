"""What may be done with the rows of a chunk between two layers of the tower. By itself: nothing."""

import torch

from evoprune.vision.layout import Scope, TokenLayout


class Reduction:
    """The base of what merges rows (merging.py) and of what lets rows follow others (followers.py); one object a chunk."""

    size_bias: bool = True  # whether attention weighs a row by its cluster size inside the group

    def begin(self, x: torch.Tensor) -> None:
        """Notes the rows before the first layer, `[R, 4, hidden]`."""

    def computed(self, layer: int, layout: TokenLayout) -> int:
        """Rows that a layer computes, where `layout` is that of the rows before the first layer."""
        return layout.rows

    def needs(self, layer: int, layout: TokenLayout) -> frozenset[str]:
        """What `after` compares of a layer: as in `Merger.needs`; empty for nothing."""
        return frozenset()

    def active(self, layer: int) -> torch.Tensor | None:
        """int64: the rows that go through the layer's MLP; None for all."""
        return None

    def acts(self, layer: int, layout: TokenLayout) -> bool:
        """Whether `after` changes anything after a layer."""
        return False

    def after(
        self,
        layer: int,
        scope: Scope,
        x: torch.Tensor,
        layout: TokenLayout,
        keys: torch.Tensor | None,
        received: torch.Tensor | None,
    ) -> tuple[torch.Tensor, TokenLayout]:
        """The rows for the next layer and their layout, from `x` (`[R, 4, hidden]`) after a layer whose attention has `scope`.

        `keys` (`[R, 4, heads, d]`) and `received` (float32 `[R]`) are those of the layer, if `needs` asks for them, else None.
        """
        return x, layout

    def all_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The states `[R', 4, hidden]` of all rows that leave the tower, from those that a layer has computed."""
        return x

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[R', ...]` of all rows that leave the tower, from those of the rows of a layer."""
        return values
