"""How visual tokens are pruned, as planning, encoding, answering and reports carry it: a method and a budget, parsed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from evoprune.backend import devices
from evoprune.methods import registry
from evoprune.methods.chain import MethodChain
from evoprune.methods.plans import (
    AUTO,
    AUTO_INFLECTION,
    AUTO_MOST,
    AUTOS,
    EncoderPlan,
    Grid,
    TowerShape,
    keep_tokens,
    plain,
    share_of,
)


@dataclass(frozen=True)
class PruneConfig:
    """Made by `of`."""

    name: str  # of the method, as the user wrote it
    method: MethodChain
    budget: (
        float | str
    )  # as reports have it: a share, a preset's name, "auto", "auto:inflection"; 1.0 if nothing is pruned
    share: float  # of an input's tokens that is kept, at most; a `Preset` has a second one for a single frame pair
    seed: int = 0

    @classmethod
    def of(cls, budget: float | str, name: str, args: dict[str, str] | None = None, seed: int = 0) -> Self:
        """What a budget of `parse_budget` or "auto", and a method with settings as texts, stand for.

        Raises UsageError: no such method or setting, or a budget of "auto" where the method cannot let the content decide.
        """
        method = registry.parse(name, args)
        if budget == AUTO_INFLECTION:
            method = method.by_inflection()
        elif budget == AUTO:
            method = method.automatic()
        return cls(name, method, plain(method.reported_budget(budget)), AUTO_MOST if budget in AUTOS else budget, seed)

    @property
    def acts(self) -> bool:
        """Whether anything is pruned."""
        return self.method.acts_at(self.share)

    def keep(self, grid: Grid) -> int:
        """K of one input: `grid` is (T, H, W) in units."""
        return keep_tokens(self.share, grid)

    def plan(self, tower: TowerShape, grid: Grid) -> EncoderPlan:
        """The encoder's work on one input, of which K tokens are for the language model."""
        return self.method.plan(tower, grid, self.keep(grid))

    def after_tower_below(self, device: torch.device) -> int:
        """Return the number of units below which a device prunes an input after the tower alone; 0 if no size changes anything."""
        if self.share == 1:
            return 0
        return self.method.after_tower_below(devices.launch_bound_units(device))

    def share_of_all(self, grids: Sequence[Grid]) -> float:
        """The share of all units of several inputs that is kept, for methods that know only one share."""
        return share_of(self.share, grids)
