"""The base class of methods that merge rows between tower layers, and the schedules of how many rows each layer removes."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from evoprune.methods.base import EncoderMethod
from evoprune.methods.plans import Grid, Merge, Stage, TowerShape, spread
from evoprune.methods.types import Candidates

ALLOCATIONS = ("mean", "skip", "first", "last", "increasing", "decreasing")


@dataclass(frozen=True)
class Merger(EncoderMethod, ABC):
    """A method that merges similar rows between the encoder's layers. Only rows in the same window or frame pair can merge."""

    # The feature that `match` compares: "keys" (the layer's keys before rotary embedding), "keys_rotary", or "hidden". Add
    # "attention" if `match` also needs the attention that the rows receive in the layer.
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    size_bias: ClassVar[bool] = True  # whether attention weights a merged row by its cluster size (ToMe, section 3)

    @abstractmethod
    def match(self, candidates: Candidates, remove: torch.Tensor) -> torch.Tensor:
        """Choose which rows to merge, and which rows to merge them into.

        The encoder calls this method repeatedly until every group has lost enough rows. Each round must remove at least one row in
        total. On a GPU, the method must not read values back to the host, so it cannot use `item`, `nonzero`, or boolean indexing.

        Args:
            remove: int64 `[B]`, the maximum number of rows to remove from each group in this round.

        Returns:
            int64 `[B, n]`, the row that each row merges into, as an index within the group. Kept rows map to themselves.
        """

    def rows(self, tower: TowerShape, units: int, windows: int, keep: int) -> list[int]:
        """Return the number of rows left in a frame pair after each layer. By default, all layers remove the same number of rows.

        Args:
            keep: The number of rows to leave after the last layer.
        """
        return rows_after_layers(tower, units, windows, keep, layer_weights(tower.depth, "mean", 0.0, 1.0))

    def rounds(self, rows: int, left: int) -> int:
        """Return the maximum number of `match` calls needed to reduce a group from `rows` to `left` rows."""
        return rows - left

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        count, height, width = grid
        units = height * width
        windows = tower.windows(height, width)
        shares = [max(1, share) for share in spread(keep, count)]
        of_share = {share: self.rows(tower, units, windows, share) for share in set(shares)}
        stages = []
        before = prod(grid)
        for layer, left in enumerate(zip(*(of_share[share] for share in shares), strict=True), 1):
            if sum(left) < before:
                before = sum(left)
                stages.append(Stage(layer, before, Merge(self, left)))
        return stages


def layer_weights(depth: int, allocation: str, first: float, last: float) -> dict[int, float]:
    """Return the layers that reduce the number of rows, and each layer's share of the total reduction.

    The allocations come from EvoPrune (arXiv 2603.03681).

    Args:
        allocation: How to distribute the reduction over the layers. One of `ALLOCATIONS`.
        first, last: The range of layers as relative depths, where layer l ends at (l + 1) / depth. The range always covers at least
            one layer.

    Raises:
        ValueError: If the allocation is unknown or the range is empty.
    """
    if allocation not in ALLOCATIONS or not 0 <= first <= last <= 1:
        known = f"use one of {ALLOCATIONS}, and 0 <= first <= last <= 1"
        raise ValueError(f"no schedule {allocation!r} from {first} to {last}: {known}")
    end = min(depth, max(1, round(last * depth))) - 1
    begin = min(end, max(0, math.ceil(first * depth) - 1))
    layers = list(range(begin, end + 1))
    n = len(layers)
    weights = {
        "mean": lambda i: 1,
        "skip": lambda i: (n - 1 - i) % 2 == 0,  # every second layer, including the last layer of the range
        "first": lambda i: i < (n + 1) // 2,
        "last": lambda i: i >= n // 2,
        "increasing": lambda i: i + 1,
        "decreasing": lambda i: n - i,
    }[allocation]
    total = sum(weights(i) for i in range(n))
    return {layer: weights(i) / total for i, layer in enumerate(layers) if weights(i)}


def rows_after_layers(tower: TowerShape, units: int, windows: int, keep: int, weights: dict[int, float]) -> list[int]:
    """Return the number of rows in one frame pair after each layer, from `units` down to `keep`.

    A layer that merges within windows must leave at least one row in each window. The next full-attention layer removes any excess
    rows, even if it is not in `weights`. In a tower without full-attention layers, more than `keep` rows can remain.

    Args:
        weights: Each layer's share of the reduction, from `layer_weights`.
    """
    rows = units
    done = 0.0
    counts = []
    for layer in range(tower.depth):
        done += weights.get(layer, 0.0)
        wish = units - math.floor((units - keep) * min(done, 1.0) + 0.5)
        if tower.scope(layer) == "window":
            wish = max(wish, windows)
            if layer not in weights:  # among layers not listed in `weights`, only full-attention layers reduce rows
                wish = rows
        rows = min(rows, wish)
        counts.append(rows)
    return counts
