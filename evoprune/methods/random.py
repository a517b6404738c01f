"""Uniform choice after the encoder: the floor every method must beat."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from evoprune.methods.base import Method, Tokens
from evoprune.pruning.budget import spread


@dataclass(frozen=True)
class Random(Method):
    """Draws without replacement, the same number from every grid (stratified), by `tokens.seed`."""

    name: ClassVar[str] = "random"
    acts: ClassVar[Literal["after"]] = "after"

    def select(self, tokens: Tokens, keep: int) -> torch.Tensor:
        grids, per_grid = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        generator = torch.Generator("cpu").manual_seed(tokens.seed)  # the same draw on every device
        chosen = [
            torch.randperm(per_grid, generator=generator, device="cpu")[:share].sort().values + grid * per_grid
            for grid, share in enumerate(spread(keep, grids))
        ]
        return torch.cat(chosen)
