"""Plans: the work that the encoder does on a video, and how tokens are spread over its frame pairs. Does not import torch.

A method makes its plan before the first frame is read. The encoder executes the plan. The memory check, the cost estimate and the
cache key are also based on it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Literal, Self

from evoprune.backend import DeviceName
from evoprune.model import VisionConfig

# Spreading tokens over frame pairs.


def spread(keep: int, pairs: int) -> list[int]:
    """Divide `keep` tokens evenly among frame pairs.

    If the mean is not a whole number, it is rounded up for some frame pairs, at even distances over the clip, and down for the
    others.
    """
    return [(i + 1) * keep // pairs - i * keep // pairs for i in range(pairs)]


# The encoder's plan: the number of tokens to keep, and the stages that reduce rows on the way.

ALLOCATIONS = ("mean", "skip", "first", "last", "increasing", "decreasing")

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TowerShape:
    """The properties of a vision tower that plans depend on."""

    depth: int
    full_layers: tuple[int, ...]  # layers whose attention spans a whole frame pair; other layers attend inside windows
    window: int = 4  # side length of a window in units
    launch_bound: int = 0  # inputs with fewer units are launch-bound: computing fewer rows saves no time

    @classmethod
    def of(cls, sizes: VisionConfig, device: str) -> Self:
        """Return the shape of a tower with these sizes on a device such as "cuda:1"."""
        window = sizes.window_size // sizes.patch_size // sizes.spatial_merge_size
        return cls(sizes.depth, sizes.fullatt_block_indexes, window, DeviceName(device).launch_bound_units)

    @classmethod
    def of_tower(cls, visual) -> Self:
        """Return the shape of a loaded tower, which may be this project's `Tower` or a transformers module."""
        return cls.of(VisionConfig.of(visual.config), str(visual.patch_embed.proj.weight.device))

    def scope(self, layer: int) -> Literal["window", "pair"]:
        return "pair" if layer in self.full_layers else "window"

    def windows(self, height: int, width: int) -> int:
        """Return the number of windows in a frame pair of `height` x `width` units."""
        return -(-height // self.window) * -(-width // self.window)


@dataclass(frozen=True)
class Merge:
    """A merger, together with the number of rows that it leaves in each of the T frame pairs (`left`)."""

    merger: Any
    left: tuple[int, ...]


@dataclass(frozen=True)
class SetAside(ABC):
    """Sets aside rows of each frame pair. They return after the last layer in a way that the method defines (contrib/ipcv.py)."""

    left: int  # the number of rows per frame pair that stay

    @abstractmethod
    def hook(self, first_layer: int) -> Callable:
        """Return the `Hook` (vision/hooks.py) that sets rows of a video aside and restores them. For `first_layer`, see `Stage`."""


@dataclass(frozen=True)
class Stage:
    """A point in the tower at which the number of rows is reduced."""

    # The number of layers that run before the stage. At 0, it acts on the patch embeddings, and at the tower's depth, on its
    # output.
    first_layer: int
    rows: int  # the number of rows in the whole video after the stage; an upper bound if not `exact`
    reduce: Any  # a `Selector` of rows (or of tokens, after the last layer), a `Merge` or a `SetAside`
    exact: bool = True  # whether `rows` is exact, whatever the content
    whole_pairs: bool = False  # whether the selector keeps or drops whole frame pairs
    # Whether to keep only the tokens before the inflection point of the selector's sorted scores (methods/selecting.py).
    inflection: bool = False

    @property
    def inside_pairs(self) -> bool:
        """Whether rows are merged or set aside inside frame pairs, rather than selected from all rows of the video."""
        return isinstance(self.reduce, Merge | SetAside)

    @property
    def selector(self) -> Any:
        """The selector, or None if rows are merged or set aside."""
        return None if self.inside_pairs else self.reduce


@dataclass(frozen=True)
class EncoderPlan:
    """The work that the encoder does on one video.

    Raises:
        ValueError: If stages are out of order, or if rows are merged or set aside after a selection from all rows of the video.
    """

    grid: Grid  # (T, H, W) in units, as the encoder sees it; an input method makes it smaller than the video's grid
    keep: int  # K, the number of tokens for the language model
    depth: int  # the number of layers of the tower
    # A unit that changed by at least this many of 255 levels is encoded again. With 0, every unit is encoded.
    reuse: float = 0.0
    stages: tuple[Stage, ...] = ()  # in the order of their layers; the final stage may select tokens after the tower
    # Inputs with fewer units than this are pruned only after the tower. Larger inputs are pruned inside it as well. 0 if all sizes
    # are treated alike.
    after_tower_below: int = 0

    def __post_init__(self):
        for stage, after in pairwise(self.stages):
            if after.first_layer < stage.first_layer or (after.inside_pairs and not stage.inside_pairs):
                raise ValueError(f"stage {after} cannot come after {stage}")
        if self.row_stages and any(isinstance(stage.reduce, SetAside) for stage in self.stages):
            raise ValueError("rows that are set aside return after the last layer, so no rows may be selected before")

    @classmethod
    def full(cls, tower: TowerShape, grid: Grid) -> Self:
        """Return the plan that sends every unit through every layer and turns each unit into a token."""
        return cls(grid, prod(grid), tower.depth)

    @property
    def units(self) -> int:
        """N, the number of units in the grid."""
        return prod(self.grid)

    @property
    def prunes(self) -> bool:
        """Whether there are fewer tokens than units."""
        return self.keep < self.units

    @property
    def exact(self) -> bool:
        """Whether `layers` and `rows` are exact. If not, the numbers depend on the content, and these are upper bounds."""
        return not self.reuse and all(stage.exact for stage in self.stages if stage is not self.token_stage)

    @property
    def token_stage(self) -> Stage | None:
        """The stage that selects tokens after the tower, or None."""
        if not self.stages:
            return None
        last = self.stages[-1]
        if last.first_layer != self.depth or last.inside_pairs:
            return None
        return last

    @property
    def inside_pairs(self) -> list[Stage]:
        """The stages that merge rows, or set them aside, inside frame pairs. They precede all other stages."""
        return [stage for stage in self.stages if stage.inside_pairs]

    @property
    def row_stages(self) -> list[Stage]:
        """The stages that sit between layers and select from all of the video's rows."""
        return [stage for stage in self.stages if not stage.inside_pairs and stage is not self.token_stage]

    @property
    def steps(self) -> list[tuple[range, Stage | None]]:
        """Pairs of a range of layers and the stage that follows it.

        There is one pair for each of the `row_stages`, and a final pair with the remaining layers and None.
        """
        edges = [0, *(stage.first_layer for stage in self.row_stages), self.depth]
        layers = [range(first, last) for first, last in pairwise(edges)]
        return list(zip(layers, [*self.row_stages, None], strict=True))

    @property
    def layers(self) -> tuple[int, ...]:
        """The number of rows that each layer computes, summed over the whole video."""
        edges = [(0, self.units), *((s.first_layer, s.rows) for s in self.stages), (self.depth, 0)]
        return tuple(rows for (first, rows), (last, _) in pairwise(edges) for _ in range(first, last))

    @property
    def rows(self) -> int:
        """The number of rows that leave the tower."""
        fewer = (s for s in self.stages if s is not self.token_stage and not isinstance(s.reduce, SetAside))
        counts = [self.units, *(stage.rows for stage in fewer)]
        return counts[-1]


def layer_weights(depth: int, allocation: str, first: float, last: float) -> dict[int, float]:
    """Return the layers that reduce rows, each with its share of the total reduction.

    The allocations come from EvoPrune (arXiv 2603.03681).

    Args:
        allocation: One of `ALLOCATIONS`.
        first, last: The range of relative depths, where layer l ends at (l + 1) / depth. The range covers at least one layer.

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
        "skip": lambda i: (n - 1 - i) % 2 == 0,  # counted from the end, so that the range's last layer reduces rows
        "first": lambda i: i < (n + 1) // 2,
        "last": lambda i: i >= n // 2,
        "increasing": lambda i: i + 1,
        "decreasing": lambda i: n - i,
    }[allocation]
    total = sum(weights(i) for i in range(n))
    return {layer: weights(i) / total for i, layer in enumerate(layers) if weights(i)}


def rows_after_layers(tower: TowerShape, units: int, windows: int, keep: int, weights: dict[int, float]) -> list[int]:
    """Return the number of rows in one frame pair after each layer, from `units` down to `keep`.

    A layer that merges inside windows leaves at least one row in each of the `windows`. The next full-attention layer removes the
    excess rows, even if it is not in `weights`. If the tower has no full-attention layer, more than `keep` rows can remain.

    Args:
        weights: The result of `layer_weights`.
    """
    rows = units
    done = 0.0
    counts = []
    for layer in range(tower.depth):
        done += weights.get(layer, 0.0)
        wish = units - math.floor((units - keep) * min(done, 1.0) + 0.5)
        if tower.scope(layer) == "window":
            wish = max(wish, windows)
            if layer not in weights:  # of the layers that are not in `weights`, only full-attention layers reduce rows
                wish = rows
        rows = min(rows, wish)
        counts.append(rows)
    return counts
