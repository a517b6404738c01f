"""FastV (arXiv 2403.06764): after the second layer, the visual tokens with the most attention of the last token stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evoprune.methods.base import LanguageMethod
from evoprune.methods.settings import Part
from evoprune.pruning.language_plan import LanguagePlan, one_drop
from evoprune.pruning.ranking import highest, relative
from evoprune.pruning.types import LayerTokens, Selection


@dataclass(frozen=True)
class FastV(LanguageMethod):
    name: ClassVar[str] = "fastv"
    source: ClassVar[str] = "arXiv 2403.06764, section 4"

    depth: Part = 2 / 32  # share of the layers that run before tokens leave

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """float32 `[n]`, at least 0: what the tokens that stay have most of."""
        return tokens.attention()

    def select(self, tokens: LayerTokens) -> Selection:
        return Selection(highest(relative(self.score(tokens)), tokens.left))
