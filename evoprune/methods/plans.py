"""Plans: what the encoder does with a video, and how tokens are spread over its frame pairs. No torch.

A method makes its plan before the first frame is read. The encoder runs it; the memory check, the cost and the
cache's key read it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import prod
from typing import Any, Literal, Self

from evoprune.backend import limits
from evoprune.model import VisionConfig

# How tokens are spread over the frame pairs.


def spread(keep: int, pairs: int) -> list[int]:
    """Divides `keep` tokens among equal frame pairs; each gets the mean, rounded down, or up at even distances over the clip."""
    return [(i + 1) * keep // pairs - i * keep // pairs for i in range(pairs)]


def apportion(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Divides `total` in proportion to `weights` (at least 0), by largest remainder, with a limit (`most`) for each share.

    Excess above a limit goes to the others, in proportion again; if only weights of zero are left, evenly. Ties go by index.
    The shares sum to `total`, or to the sum of `most` if that is less.
    """
    counts = [0] * len(most)
    quotas = {}
    open_ = [i for i, limit in enumerate(most) if limit > 0]
    while open_:
        left = total - sum(counts)
        parts = {i: Fraction(weights[i]) for i in open_}
        if not any(parts.values()):
            parts = dict.fromkeys(open_, Fraction(1))
        whole = sum(parts.values())
        quotas = {i: left * part / whole for i, part in parts.items()}
        full = [i for i in open_ if quotas[i] >= most[i]]
        if not full:
            break
        for i in full:
            counts[i] = most[i]
        open_ = [i for i in open_ if i not in full]
    for i in open_:
        counts[i] = math.floor(quotas[i])
    missing = total - sum(counts)
    for i in sorted(open_, key=lambda i: (counts[i] - quotas[i], i))[:missing]:
        counts[i] += 1
    return counts


# The encoder's plan: how many tokens to keep, and the stages that reduce rows on the way.

ALLOCATIONS = ("mean", "skip", "first", "last", "increasing", "decreasing")

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TowerShape:
    """The properties of a vision tower that plans depend on."""

    depth: int
    full_layers: tuple[int, ...]  # whose attention spans a whole frame pair; the others attend inside windows
    window: int = 4  # its side in units
    launch_bound: int = 0  # inputs of fewer units take the time of their launches, whatever the number of rows

    @classmethod
    def of(cls, sizes: VisionConfig, device: str) -> Self:
        """Return the shape of a tower of these sizes on a device, such as "cuda:1"."""
        window = sizes.window_size // sizes.patch_size // sizes.spatial_merge_size
        return cls(sizes.depth, sizes.fullatt_block_indexes, window, limits.launch_bound_units(device))

    def scope(self, layer: int) -> Literal["window", "pair"]:
        return "pair" if layer in self.full_layers else "window"

    def windows(self, height: int, width: int) -> int:
        """Return the number of windows in a frame pair of `height` x `width` units."""
        return -(-height // self.window) * -(-width // self.window)


@dataclass(frozen=True)
class Merge:
    """A merger merges rows inside each window or frame pair, until each frame pair has as many as `left`, `[T]`, says."""

    merger: Any
    left: tuple[int, ...]


@dataclass(frozen=True)
class SetAside(ABC):
    """Rows are set aside inside frame pairs, and come back after the last layer; how is the method's (contrib/ipcv.py)."""

    left: int  # rows of each frame pair that stay

    @abstractmethod
    def hook(self, first_layer: int) -> Callable:
        """Return what does so in one video from `first_layer` on, as in `Stage`: a `Hook` (vision/hooks.py)."""


@dataclass(frozen=True)
class Stage:
    """From one layer of the tower on there are fewer rows."""

    first_layer: int  # how many layers have run: 0 for patch embeddings, the tower's depth for after its last layer
    rows: int  # of the whole video from there on; an upper bound if not `exact`
    reduce: Any  # a `Selector` of rows, or of tokens after the last layer; `Merge`, `SetAside`
    exact: bool = True  # whether `rows` does not depend on the content
    whole_pairs: bool = False  # whether the selector keeps all rows of a frame pair or none
    inflection: bool = (
        False  # whether it keeps the tokens before the inflection of its sorted scores (methods/selecting.py)
    )

    @property
    def inside_pairs(self) -> bool:
        """Whether rows are merged or set aside inside frame pairs; otherwise it selects among those of the video."""
        return isinstance(self.reduce, Merge | SetAside)

    @property
    def selector(self) -> Any:
        """Its selector; None where rows merge or are set aside."""
        return None if self.inside_pairs else self.reduce


@dataclass(frozen=True)
class EncoderPlan:
    """The encoder's work on one video.

    Raises ValueError: stages that are out of order, or that merge or set aside after a selection among the rows of the video.
    """

    grid: Grid  # (T, H, W) in units, as the encoder sees it; an input method makes it smaller than the video's own
    keep: int  # K, the number of tokens for the language model
    depth: int  # layers of the tower
    # A unit is encoded again if it changes by at least this many levels of 255; 0 encodes every unit
    reuse: float = 0.0
    stages: tuple[Stage, ...] = ()  # in the order of their layers; the last may select tokens, after the last layer
    # Inputs of fewer units are pruned after the tower alone, where others are pruned inside it; 0 where no size changes that
    after_tower_below: int = 0

    def __post_init__(self):
        for stage, after in pairwise(self.stages):
            if after.first_layer < stage.first_layer or (after.inside_pairs and not stage.inside_pairs):
                raise ValueError(f"stage {after} cannot come after {stage}")
        if self.row_stages and any(isinstance(stage.reduce, SetAside) for stage in self.stages):
            raise ValueError("rows that are set aside come back after the last layer, and none may be selected before")

    @property
    def units(self) -> int:
        """N, all units of the grid."""
        return prod(self.grid)

    @property
    def prunes(self) -> bool:
        """Whether there are fewer tokens than units."""
        return self.keep < self.units

    @property
    def exact(self) -> bool:
        """Whether `layers` and `rows` are exact; otherwise they are upper bounds, and the content decides."""
        return not self.reuse and all(stage.exact for stage in self.stages if stage is not self.token_stage)

    @property
    def token_stage(self) -> Stage | None:
        """The stage that selects tokens after the tower."""
        if not self.stages:
            return None
        last = self.stages[-1]
        if last.first_layer != self.depth or last.inside_pairs:
            return None
        return last

    @property
    def inside_pairs(self) -> list[Stage]:
        """The stages that merge rows or set them aside inside frame pairs; they come first."""
        return [stage for stage in self.stages if stage.inside_pairs]

    @property
    def row_stages(self) -> list[Stage]:
        """The stages between layers that select among the rows of the whole video."""
        return [stage for stage in self.stages if not stage.inside_pairs and stage is not self.token_stage]

    @property
    def steps(self) -> list[tuple[range, Stage | None]]:
        """The layers up to each of `row_stages`, with it; and those after the last one, with None."""
        edges = [0, *(stage.first_layer for stage in self.row_stages), self.depth]
        layers = [range(first, last) for first, last in pairwise(edges)]
        return list(zip(layers, [*self.row_stages, None], strict=True))

    @property
    def layers(self) -> tuple[int, ...]:
        """Rows that each layer computes, over the whole video."""
        edges = [(0, self.units), *((s.first_layer, s.rows) for s in self.stages), (self.depth, 0)]
        return tuple(rows for (first, rows), (last, _) in pairwise(edges) for _ in range(first, last))

    @property
    def rows(self) -> int:
        """Rows that leave the tower."""
        fewer = (s for s in self.stages if s is not self.token_stage and not isinstance(s.reduce, SetAside))
        counts = [self.units, *(stage.rows for stage in fewer)]
        return counts[-1]


def full_plan(tower: TowerShape, grid: Grid) -> EncoderPlan:
    """Return the plan in which every unit goes through every layer and becomes a token."""
    return EncoderPlan(grid, prod(grid), tower.depth)


def layer_weights(depth: int, allocation: str, first: float, last: float) -> dict[int, float]:
    """Return the layers that reduce, each with its share of the whole reduction, by an allocation of EvoPrune (arXiv 2603.03681).

    `first` and `last`: the range in relative depth, of at least one layer; layer l ends at (l + 1) / depth.

    Raises ValueError: an unknown allocation or an empty range.
    """
    if allocation not in ALLOCATIONS or not 0 <= first <= last <= 1:
        known = f"one of {ALLOCATIONS}, 0 <= first <= last <= 1"
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
    excess, even if it is outside the range; in a tower without one, more than `keep` (at least 1) are left. `weights`: from
    `layer_weights`.
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
