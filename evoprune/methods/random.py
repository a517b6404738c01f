"""Random tokens after the encoder: the floor that every method must beat."""

from dataclasses import dataclass

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.budget import spread
from evoprune.pruning.ranking import of_pairs
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Random(Selector):
    """Draws without replacement inside each frame pair, seeded with `tokens.seed`."""

    name = "random"
    source = "this project; a common baseline"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        generator = torch.Generator("cpu").manual_seed(tokens.seed)  # the same draw on every device
        drawn = (
            torch.randperm(per_pair, generator=generator, dtype=torch.int64, device="cpu")[:share].sort().values
            for share in spread(keep, pairs)
        )
        return of_pairs(drawn, per_pair)
