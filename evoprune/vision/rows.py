"""The rows of a video: their values, and which units they represent."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from evoprune.methods.types import Selection


@dataclass
class Rows:
    """Rows of a video, in window order from the embedding to the last layer. What reads them by unit gets `by_unit`."""

    values: torch.Tensor  # `[E, 4, hidden]`, or `[E, D]` after the patch merger
    deepstack: torch.Tensor  # `[E, n, D]`, the features of inner layers so far; averaged where the rows are
    unit: torch.Tensor  # int64 `[E]`, the unit whose place each row has
    unit_to_row: torch.Tensor  # int64 `[N]`, the row that represents each unit, -1 for none

    def by_unit(self) -> tuple["Rows", torch.Tensor]:
        """Return the rows in ascending order of their units; and the index here of each, int64 `[E]`."""
        unit, order = self.unit.sort()
        unit_to_row = _or_none(order.argsort())[self.unit_to_row]
        deepstack = self.deepstack[order] if self.deepstack.numel() else self.deepstack
        return Rows(self.values[order], deepstack, unit, unit_to_row), order

    def take(self, selection: Selection, unit_to_token: torch.Tensor, rank: torch.Tensor) -> "Rows":
        """Return a row for each selected unit, in ascending order of `rank`.

        Args:
            selection: among these rows, which are ordered by unit.
            unit_to_token: int64 `[N]`, the index in `selection.kept` of what represents each unit, -1 for none.
            rank: int64 `[N]`, of each unit.
        """
        order = rank[selection.kept].argsort()
        place = _or_none(order.argsort())
        unit_to_row = place[unit_to_token]
        joins = None if selection.unit_to_token is None else unit_to_row
        means = selection.means
        if means is not None:
            means = place[means[0]], *means[1:]
        ordered = replace(selection, kept=selection.kept[order], unit_to_token=joins, means=means)
        values, deepstack = self.averaged(ordered)
        return Rows(values, deepstack, ordered.kept, unit_to_row)

    def averaged(self, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `[K, ...]`, values and DeepStack features of the selected units."""
        means = []
        for x in (self.values, self.deepstack):
            shape = len(selection.kept), *x.shape[1:]
            mean = x.new_empty(shape)
            if x.numel():
                mean = selection.features(x.flatten(1), self.unit_to_row).view(shape)
            means.append(mean)
        return tuple(means)


def _or_none(index: torch.Tensor) -> torch.Tensor:
    """`index` (int64 `[n]`) with a last entry of -1, which -1 finds."""
    return F.pad(index, (0, 1), value=-1)
