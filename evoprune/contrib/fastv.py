"""FastV and FlashVID's second stage. Both keep the most attended tokens after a certain layer of the language model."""

from dataclasses import dataclass

from evoprune.contrib.shared import Part
from evoprune.methods import LanguageMethod, LanguagePlan, one_drop


@dataclass(frozen=True)
class FastV(LanguageMethod):
    """FastV (arXiv 2403.06764, section 4): keeps the most attended tokens after a few layers.

    After the first `depth` fraction of the layers, the method keeps the tokens that receive the most attention from the last prompt
    token, averaged over heads.

    Differences from the authors' code: the authors renumber the remaining tokens, while this method leaves their positions
    unchanged.
    """

    name = "fastv"
    source = "arXiv 2403.06764, section 4"

    depth: Part = 2 / 32  # fraction of the layers that run before tokens are dropped

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)


@dataclass(frozen=True)
class FlashVidInner(FastV):
    """FlashVID's second stage (arXiv 2602.08024), inside the language model: like FastV, but at a later layer.

    Differences from the authors' code: `-b` specifies the fraction of tokens that reach the language model. In the authors' code,
    more tokens reach the language model, because the budget is the mean over both stages.
    """

    name = "flashvid-inner"
    source = "arXiv 2602.08024"
    default_share = 0.3

    depth: Part = 20 / 28
