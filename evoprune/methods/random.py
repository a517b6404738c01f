"""Random tokens after the encoder: the floor that every method must beat.

Not from a paper; many papers report it as a baseline. Every frame pair keeps the same number of tokens (stratified
sampling), because whole clips are compared.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.budget import spread
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Random(Selector):
    """Draws without replacement inside each frame pair, seeded with `tokens.seed`. No fields."""

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "this project; a common baseline"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        generator = torch.Generator("cpu").manual_seed(tokens.seed)  # the same draw on every device
        drawn = [
            torch.randperm(per_pair, generator=generator, dtype=torch.int64, device="cpu")[:share] + pair * per_pair
            for pair, share in enumerate(spread(keep, pairs))
        ]
        return Selection(torch.cat(drawn).sort().values)
