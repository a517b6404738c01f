"""Plans, which describe how the vision encoder prunes a video. This module does not import torch.

A method creates its plan before the first frame is read, and the encoder executes the plan. The memory check, the cost estimate,
and the cache key are also based on the plan.
"""

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

    If they cannot be divided evenly, some frame pairs get one extra token. These frame pairs are evenly spaced over the clip.
    """
    return [(i + 1) * keep // pairs - i * keep // pairs for i in range(pairs)]


# The encoder's plan: the number of tokens to keep, and the stages that progressively reduce the number of rows.

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TowerShape:
    """The properties of a vision tower that pruning plans depend on, such as its depth and window size."""

    depth: int
    # Layers with attention over a whole frame pair; all other layers attend within windows.
    full_layers: tuple[int, ...]
    window: int = 4  # window side length, in units
    launch_bound: int = 0  # inputs with fewer units are launch-bound, so computing fewer rows would not save time
    width: int = 0  # number of channels of the tokens

    @classmethod
    def of(cls, sizes: VisionConfig, device: str) -> Self:
        """Return the shape of a vision tower with the given configuration on a device such as "cuda:1"."""
        window = sizes.window_size // sizes.patch_size // sizes.spatial_merge_size
        launch_bound = DeviceName(device).launch_bound_units
        return cls(sizes.depth, sizes.fullatt_block_indexes, window, launch_bound, sizes.out_hidden_size)

    @classmethod
    def of_tower(cls, visual) -> Self:
        """Return the shape of a loaded vision tower, which is either this project's `Tower` or a transformers module."""
        return cls.of(VisionConfig.of(visual.config), str(visual.patch_embed.proj.weight.device))

    def scope(self, layer: int) -> Literal["window", "pair"]:
        return "pair" if layer in self.full_layers else "window"

    def windows(self, height: int, width: int) -> int:
        """Return the number of windows in a frame pair of `height` x `width` units."""
        return -(-height // self.window) * -(-width // self.window)


@dataclass(frozen=True)
class Merge:
    """A merger, and the number of rows that it leaves in each of the T frame pairs."""

    merger: Any
    left: tuple[int, ...]


@dataclass(frozen=True)
class SetAside(ABC):
    """A reduction that sets aside rows of each frame pair and restores them after the last layer.

    The method defines how the rows are restored. For an example, see contrib/ipcv.py.
    """

    left: int  # number of rows per frame pair that are not set aside

    @abstractmethod
    def hook(self, first_layer: int) -> Callable:
        """Return the `Hook` (vision/hooks.py) that sets aside and restores rows of a video.

        Args:
            first_layer: The number of layers that run before rows are set aside.
        """


@dataclass(frozen=True)
class Stage:
    """A step of a pruning plan that reduces the number of rows after a certain vision tower layer."""

    # The number of layers that run before the stage. If 0, the stage acts on the patch embeddings. If equal to the tower depth, it
    # acts on the tower's output.
    first_layer: int
    rows: int  # number of rows in the whole video after the stage; an upper bound if not `exact`
    reduce: Any  # a `Selector` of rows (or of tokens, after the last layer), a `Merge`, or a `SetAside`
    exact: bool = True  # whether `rows` is exact regardless of the content
    whole_pairs: bool = False  # whether the selector keeps or drops whole frame pairs
    # Whether to keep only the tokens before the inflection point of the selector's sorted scores (methods/selecting.py).
    inflection: bool = False

    @property
    def inside_pairs(self) -> bool:
        """Whether the stage merges or sets aside rows within each frame pair, rather than selecting from all rows of the video."""
        return isinstance(self.reduce, Merge | SetAside)

    @property
    def selector(self) -> Any:
        """The stage's selector, or None if the stage merges rows or sets them aside."""
        return None if self.inside_pairs else self.reduce


@dataclass(frozen=True)
class EncoderPlan:
    """The plan for encoding one video: its size, its pruning stages, and the number of remaining tokens.

    Raises:
        ValueError: If stages are out of order, or if rows are merged or set aside after a selection from all rows of the video.
    """

    grid: Grid  # (T, H, W) in units, as seen by the encoder; an input method makes it smaller than the video's grid
    keep: int  # K, the number of tokens for the language model
    depth: int  # number of layers in the tower
    # Units are re-encoded if their pixels changed by at least this many of 255 levels. With 0, every unit is encoded.
    reuse: float = 0.0
    stages: tuple[Stage, ...] = ()  # in layer order; the final stage may select tokens after the tower
    # Inputs with fewer units than this are pruned only after the tower, while larger inputs are also pruned inside it. 0 if inputs
    # of all sizes are treated the same.
    after_tower_below: int = 0
    # Whether a unit whose pixels are predicted exactly by other units is represented by one of them. See `predicted_units`.
    predict: bool = False

    def __post_init__(self):
        for stage, after in pairwise(self.stages):
            if after.first_layer < stage.first_layer or (after.inside_pairs and not stage.inside_pairs):
                raise ValueError(f"stage {after} cannot come after {stage}")
        if self.row_stages and any(isinstance(stage.reduce, SetAside) for stage in self.stages):
            raise ValueError("rows that are set aside return after the last layer, so no rows may be selected before")

    @classmethod
    def full(cls, tower: TowerShape, grid: Grid) -> Self:
        """Return a plan without pruning: every unit goes through all layers and becomes a token."""
        return cls(grid, prod(grid), tower.depth)

    @property
    def units(self) -> int:
        """The number of units in the video's grid, called N."""
        return prod(self.grid)

    @property
    def prunes(self) -> bool:
        """Whether the language model gets fewer tokens than the video has units."""
        return self.keep < self.units

    @property
    def exact(self) -> bool:
        """Whether `layers` and `rows` are exact. If the actual counts depend on the content, `layers` and `rows` are only upper
        bounds.
        """
        return not (self.reuse or self.predict) and all(
            stage.exact for stage in self.stages if stage is not self.token_stage
        )

    @property
    def token_stage(self) -> Stage | None:
        """The stage that selects tokens after the vision tower, or None if there isn't one."""
        if not self.stages:
            return None
        last = self.stages[-1]
        if last.first_layer != self.depth or last.inside_pairs:
            return None
        return last

    @property
    def inside_pairs(self) -> list[Stage]:
        """The stages that merge rows or set them aside within each frame pair. They precede all other stages."""
        return [stage for stage in self.stages if stage.inside_pairs]

    @property
    def row_stages(self) -> list[Stage]:
        """The stages between layers that select from all rows of the video."""
        return [stage for stage in self.stages if not stage.inside_pairs and stage is not self.token_stage]

    @property
    def steps(self) -> list[tuple[range, Stage | None]]:
        """The layers and stages in the order in which the encoder runs them, as (layer range, following stage) pairs.

        There is one pair per stage in `row_stages`. The final pair contains the remaining layers, and its stage is None.
        """
        edges = [0, *(stage.first_layer for stage in self.row_stages), self.depth]
        layers = [range(first, last) for first, last in pairwise(edges)]
        return list(zip(layers, [*self.row_stages, None], strict=True))

    @property
    def layers(self) -> tuple[int, ...]:
        """The number of rows computed by each layer, summed over the whole video."""
        edges = [(0, self.units), *((s.first_layer, s.rows) for s in self.stages), (self.depth, 0)]
        return tuple(rows for (first, rows), (last, _) in pairwise(edges) for _ in range(first, last))

    @property
    def rows(self) -> int:
        """The number of rows in the vision tower's output."""
        fewer = (s for s in self.stages if s is not self.token_stage and not isinstance(s.reduce, SetAside))
        counts = [self.units, *(stage.rows for stage in fewer)]
        return counts[-1]
