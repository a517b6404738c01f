"""Plans: the encoder's work on a video, and how tokens are spread over its frame pairs. Imports no torch.

A method makes its plan before the first frame is read. The encoder runs the plan. The memory check, the cost estimate and the
cache key read it.
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

# How tokens are spread over the frame pairs.


def spread(keep: int, pairs: int) -> list[int]:
    """Divide `keep` tokens evenly among frame pairs.

    Each gets the mean rounded down, or rounded up at even distances over the clip.
    """
    return [(i + 1) * keep // pairs - i * keep // pairs for i in range(pairs)]


# The encoder's plan: how many tokens to keep, and the stages that reduce rows on the way.

ALLOCATIONS = ("mean", "skip", "first", "last", "increasing", "decreasing")

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TowerShape:
    """Properties of a vision tower that plans depend on."""

    depth: int
    full_layers: tuple[int, ...]  # layers whose attention spans a whole frame pair; the others attend inside windows
    window: int = 4  # side of a window in units
    launch_bound: int = 0  # inputs with fewer units are launch-bound: their time does not depend on the number of rows

    @classmethod
    def of(cls, sizes: VisionConfig, device: str) -> Self:
        """Return the shape of a tower with these sizes on a device such as "cuda:1"."""
        window = sizes.window_size // sizes.patch_size // sizes.spatial_merge_size
        return cls(sizes.depth, sizes.fullatt_block_indexes, window, DeviceName(device).launch_bound_units)

    @classmethod
    def of_tower(cls, visual) -> Self:
        """Return the shape of a tower in memory: the weights of this project, or a module of transformers."""
        return cls.of(VisionConfig.of(visual.config), str(visual.patch_embed.proj.weight.device))

    def scope(self, layer: int) -> Literal["window", "pair"]:
        return "pair" if layer in self.full_layers else "window"

    def windows(self, height: int, width: int) -> int:
        """Return the number of windows in a frame pair of `height` x `width` units."""
        return -(-height // self.window) * -(-width // self.window)


@dataclass(frozen=True)
class Merge:
    """A merger, and the number of rows that merging inside windows or frame pairs leaves in every frame pair (`left`, `[T]`)."""

    merger: Any
    left: tuple[int, ...]


@dataclass(frozen=True)
class SetAside(ABC):
    """Rows of a frame pair are set aside, and come back after the last layer in a way that the method defines (contrib/ipcv.py)."""

    left: int  # rows per frame pair that stay

    @abstractmethod
    def hook(self, first_layer: int) -> Callable:
        """Return the `Hook` (vision/hooks.py) that does this in one video; `first_layer` is as in `Stage`."""


@dataclass(frozen=True)
class Stage:
    """A point in the tower from which on there are fewer rows."""

    first_layer: int  # layers that have run: 0 at the patch embeddings, the tower's depth after the last layer
    rows: int  # rows of the whole video from here on; an upper bound if not `exact`
    reduce: Any  # a `Selector` of rows (of tokens after the last layer), a `Merge` or a `SetAside`
    exact: bool = True  # whether `rows` does not depend on the content
    whole_pairs: bool = False  # whether the selector keeps or drops whole frame pairs
    # Whether the selector keeps the tokens before the inflection point of its sorted scores (methods/selecting.py).
    inflection: bool = False

    @property
    def inside_pairs(self) -> bool:
        """Whether rows are merged or set aside inside frame pairs, rather than selected among all rows of the video."""
        return isinstance(self.reduce, Merge | SetAside)

    @property
    def selector(self) -> Any:
        """The selector, or None if rows are merged or set aside."""
        return None if self.inside_pairs else self.reduce


@dataclass(frozen=True)
class EncoderPlan:
    """The encoder's work on one video.

    Raises:
        ValueError: Stages are out of order, or merge or set aside rows after a selection among the rows of the video.
    """

    grid: Grid  # (T, H, W) in units, as the encoder sees it; smaller than the video's grid after an input method
    keep: int  # K, the number of tokens for the language model
    depth: int  # layers of the tower
    # A unit is encoded again if it changes by at least this many of 255 levels; 0 encodes every unit
    reuse: float = 0.0
    stages: tuple[Stage, ...] = ()  # in the order of their layers; the last may select tokens, after the last layer
    # Inputs with fewer units are pruned only after the tower, larger ones also inside it; 0 if size makes no difference
    after_tower_below: int = 0

    def __post_init__(self):
        for stage, after in pairwise(self.stages):
            if after.first_layer < stage.first_layer or (after.inside_pairs and not stage.inside_pairs):
                raise ValueError(f"stage {after} cannot come after {stage}")
        if self.row_stages and any(isinstance(stage.reduce, SetAside) for stage in self.stages):
            raise ValueError("rows that are set aside return after the last layer, so no rows may be selected before")

    @classmethod
    def full(cls, tower: TowerShape, grid: Grid) -> Self:
        """Return the plan that sends every unit through every layer and turns it into a token."""
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
        """Whether `layers` and `rows` are exact. Otherwise they are upper bounds and the content decides."""
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
        """The stages that merge rows or set them aside inside frame pairs. They come first."""
        return [stage for stage in self.stages if stage.inside_pairs]

    @property
    def row_stages(self) -> list[Stage]:
        """The stages between layers that select among the rows of the whole video."""
        return [stage for stage in self.stages if not stage.inside_pairs and stage is not self.token_stage]

    @property
    def steps(self) -> list[tuple[range, Stage | None]]:
        """The layers up to each of `row_stages`, with that stage; then the layers after the last stage, with None."""
        edges = [0, *(stage.first_layer for stage in self.row_stages), self.depth]
        layers = [range(first, last) for first, last in pairwise(edges)]
        return list(zip(layers, [*self.row_stages, None], strict=True))

    @property
    def layers(self) -> tuple[int, ...]:
        """The number of rows that each layer computes, over the whole video."""
        edges = [(0, self.units), *((s.first_layer, s.rows) for s in self.stages), (self.depth, 0)]
        return tuple(rows for (first, rows), (last, _) in pairwise(edges) for _ in range(first, last))

    @property
    def rows(self) -> int:
        """The number of rows that leave the tower."""
        fewer = (s for s in self.stages if s is not self.token_stage and not isinstance(s.reduce, SetAside))
        counts = [self.units, *(stage.rows for stage in fewer)]
        return counts[-1]


def layer_weights(depth: int, allocation: str, first: float, last: float) -> dict[int, float]:
    """Return the layers that reduce rows, with their shares of the whole reduction.

    The allocations are EvoPrune's (arXiv 2603.03681).

    Args:
        allocation: One of `ALLOCATIONS`.
        first, last: Range in relative depth, of at least one layer; layer l ends at (l + 1) / depth.

    Raises:
        ValueError: An unknown allocation or an empty range.
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
        "skip": lambda i: (n - 1 - i) % 2 == 0,  # counted from the end, so that the last layer of the range reduces
        "first": lambda i: i < (n + 1) // 2,
        "last": lambda i: i >= n // 2,
        "increasing": lambda i: i + 1,
        "decreasing": lambda i: n - i,
    }[allocation]
    total = sum(weights(i) for i in range(n))
    return {layer: weights(i) / total for i, layer in enumerate(layers) if weights(i)}


def rows_after_layers(tower: TowerShape, units: int, windows: int, keep: int, weights: dict[int, float]) -> list[int]:
    """Return the rows of one frame pair after each layer, from `units` down to `keep`.

    A layer that merges inside windows leaves at least one row in each of the `windows`. The next full-attention layer removes the
    excess, even outside the range. In a tower without such a layer, more than `keep` (at least 1) rows are left.

    Args:
        weights: From `layer_weights`.
    """
    rows = units
    done = 0.0
    counts = []
    for layer in range(tower.depth):
        done += weights.get(layer, 0.0)
        wish = units - math.floor((units - keep) * min(done, 1.0) + 0.5)
        if tower.scope(layer) == "window":
            wish = max(wish, windows)
            if layer not in weights:  # outside the range a window layer does not reduce; only full-attention layers do
                wish = rows
        rows = min(rows, wish)
        counts.append(rows)
    return counts
