"""`variant`: the method `evoprune` with what its settings do not offer, for `python -m experiments.ablations`.

What an ablation shows to be worth it moves into `evoprune`; the rest stays here, out of what users install.
"""

from dataclasses import astuple, dataclass, fields, replace
from typing import ClassVar

import torch

from evoprune.methods import registry, select
from evoprune.methods.evoprune import EvoPrune, FarthestPatches, FarthestPoints
from evoprune.methods.plans import Grid, Stage, TowerShape
from evoprune.methods.settings import check_ranges
from evoprune.methods.types import Selection, Tokens
from experiments.distances import DISTANCES, TODAY, Distance, using

PATCHES = 4  # of a unit


@dataclass(frozen=True)
class VariantPoints(FarthestPoints):
    """The selection of `Variant`, whose fields it has."""

    distance: str = TODAY
    contrast: float = 0.0
    inside: bool = False

    def select(self, tokens: Tokens, keep: int) -> Selection:
        with using(self._places()):
            return super().select(tokens, keep)

    def _places(self) -> Distance | None:
        """The distance, stretched where a unit's patches differ from one another."""
        places = DISTANCES[self.distance] or select.places_and_salience
        if not self.contrast or not self.inside:  # after the patch merger, a row has no patches
            return places

        def stretched(rows: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            place, salience = places(rows, owner)
            patches = rows.float().view(len(rows), PATCHES, -1)
            spread = patches.var(1, unbiased=False).sum(1) / patches.square().mean(1).sum(1).clamp(min=1e-12)
            return place * (1 + self.contrast * spread / spread.mean().clamp(min=1e-12)).sqrt()[:, None], salience

        return stretched


@dataclass(frozen=True)
class VariantPatches(VariantPoints):
    """The same among patch embeddings."""

    needs: ClassVar[frozenset[str]] = FarthestPatches.needs


@dataclass(frozen=True)
class Variant(EvoPrune):
    """Fields beyond those of `evoprune`:

    distance: one of `experiments.distances.DISTANCES`.
    contrast: by how much a unit counts as farther away whose patches differ as much from one another as is usual in the clip.
    """

    name: ClassVar[str] = "variant"

    distance: str = TODAY
    contrast: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, contrast="[0, inf)")
        if self.distance not in DISTANCES:
            raise ValueError(f"distance is one of {', '.join(DISTANCES)}")

    @property
    def tokens(self) -> VariantPoints:
        own = (self.distance, self.contrast)
        return VariantPoints(self.alpha, self.floor, self.average, self.count, self.within, *own)

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        plain = EvoPrune(**{field.name: getattr(self, field.name) for field in fields(EvoPrune)})
        points = replace(self.tokens, average=False, within=0.0, inside=True)
        patches = VariantPatches(*astuple(points))
        return [
            replace(stage, reduce=points if stage.first_layer else patches) for stage in plain.stages(tower, grid, keep)
        ]


def register() -> None:
    """Lets `methods.get` find `variant` in this process."""
    registry.CORE[Variant.name] = "experiments.variants:Variant"
