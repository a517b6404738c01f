"""The encoder's plan for a video, made before its first frame is read. Plain integers, no tensors.

A method makes the plan once, from the shape of the tower, the grid and the number of tokens to keep. The encoder runs
it. The memory check, the estimate of the time to the first token, and the cache's key read it.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TowerShape:
    """The properties of a vision tower that plans depend on.

    Attributes:
        depth: number of layers.
        full_layers: layers whose attention spans a whole frame pair; the others attend inside windows.
        window: side of a window in units.
    """

    depth: int
    full_layers: tuple[int, ...]
    window: int = 4

    def scope(self, layer: int) -> Literal["window", "pair"]:
        """The scope of attention in a layer."""
        return "pair" if layer in self.full_layers else "window"

    def windows(self, height: int, width: int) -> int:
        """Number of windows in a frame pair of `height` x `width` units."""
        return -(-height // self.window) * -(-width // self.window)


@dataclass(frozen=True)
class Following:
    """Rows that are dropped inside the tower, follow others, and come back at its end (vision/followers.py).

    Attributes:
        first: number of layers before rows are dropped.
        last: number of layers up to which dropped rows are keys and values of attention.
        rows: how many rows of each frame pair stay.
        neighbours: how many of these each dropped row follows.
    """

    first: int
    last: int
    rows: int
    neighbours: int


@dataclass(frozen=True)
class EncoderPlan:
    """The encoder's work on one video.

    Attributes:
        grid: (T, H, W) in units, as the encoder sees the video; an input method makes it smaller than the video's own.
        keep: K, the number of tokens for the language model.
        layers: rows that each layer computes, over the whole video.
        rows: rows that leave the tower.
        exact: whether `layers` and `rows` are exact; otherwise they are upper bounds, and the content decides.
        reuse: a unit is encoded again if it changes by at least this many levels of 255; 0 encodes every unit.
        merged: rows left in each frame pair after each layer, `[T][depth]`; None where nothing merges.
        select_after: numbers of layers before each selection inside the tower, ascending.
        whole_pairs: whether these selections keep all rows of a frame pair or none.
        following: how rows are dropped for a while; None where none are.
    """

    grid: Grid
    keep: int
    layers: tuple[int, ...]
    rows: int
    exact: bool = True
    reuse: float = 0.0
    merged: tuple[tuple[int, ...], ...] | None = None
    select_after: tuple[int, ...] = ()
    whole_pairs: bool = False
    following: Following | None = None

    @property
    def units(self) -> int:
        """N, all units of the grid."""
        return prod(self.grid)

    @property
    def prunes(self) -> bool:
        """Whether there are fewer tokens than units."""
        return self.keep < self.units

    @property
    def layers_before(self) -> range:
        """The layers before the first selection inside the tower; all without one."""
        return range(self.select_after[0] if self.select_after else len(self.layers))

    @property
    def layers_after(self) -> list[range]:
        """The layers between each selection inside the tower and the next one."""
        return [range(first, last) for first, last in pairwise((*self.select_after, len(self.layers)))]


def full_plan(tower: TowerShape, grid: Grid, keep: int | None = None) -> EncoderPlan:
    """The plan in which every unit goes through every layer, and `keep` tokens (default: all) are selected after the last."""
    units = prod(grid)
    return EncoderPlan(grid, units if keep is None else keep, (units,) * tower.depth, units)
