"""Uniform choice after the encoder: the floor every method must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.budget import spread
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Random(Selector):
    """Draws without replacement, the same number from every grid (stratified), by `tokens.seed`."""

    name: ClassVar[str] = "random"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        grids, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        generator = torch.Generator("cpu").manual_seed(tokens.seed)  # the same draw on every device
        chosen = [
            torch.randperm(per_pair, generator=generator, device="cpu")[:share].sort().values + grid * per_pair
            for grid, share in enumerate(spread(keep, grids))
        ]
        return Selection(torch.cat(chosen))
