"""PyramidDrop (arXiv 2410.17247): after a quarter, a half and three quarters of the layers a share of the visual tokens stays."""

from dataclasses import dataclass

from evoprune.methods.base import LanguageMethod
from evoprune.pruning.language_plan import LanguagePlan, several_drops
from evoprune.pruning.ranking import highest, relative
from evoprune.pruning.types import LayerTokens, Selection

PLACES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class PyramidDrop(LanguageMethod):
    name = "pyramiddrop"
    source = "arXiv 2410.17247, section 3.2"
    default_share = 7 / 24  # (1/2 + 1/4 + 1/8) / 3: half of the tokens leave each time

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return several_drops(depth, tokens, PLACES, lambda share: (share, share**2, share**3), budget)

    def select(self, tokens: LayerTokens) -> Selection:
        return Selection(highest(relative(tokens.following().attention()), tokens.left))
