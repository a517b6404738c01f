"""A selector that goes by the norm of tokens: loudest-rows."""

from dataclasses import dataclass

import torch

from evoprune.methods.base import Selector
from evoprune.methods.ranking import highest, snap
from evoprune.methods.types import Selection, Tokens


@dataclass(frozen=True)
class LoudestRows(Selector):
    """Keep the tokens of greatest norm, over the whole video. O(N D)."""

    name = "loudest-rows"
    source = "this project"

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return snap(tokens.features.float().norm(dim=1))  # equals become ties, which go by index

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(highest(self.scores(tokens), keep))
