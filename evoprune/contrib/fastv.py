"""FastV, and the second stage of FlashVID: the most attended tokens after one layer."""

from dataclasses import dataclass

from evoprune.contrib.shared import Part
from evoprune.methods import LanguageMethod, LanguagePlan, one_drop


@dataclass(frozen=True)
class FastV(LanguageMethod):
    """FastV (arXiv 2403.06764, section 4): after a few layers, keep the most attended tokens.

    After a share `depth` of the layers, the tokens stay that receive the most attention from the prompt's last token, averaged over
    heads.

    What differs: positions stay as they are; the authors' code renumbers them.
    """

    name = "fastv"
    source = "arXiv 2403.06764, section 4"

    depth: Part = 2 / 32  # share of the layers that run before tokens are dropped

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)


@dataclass(frozen=True)
class FlashVidInner(FastV):
    """FlashVID (arXiv 2602.08024), the stage inside the language model: FastV, later.

    What differs: `-b` is the share that reaches the language model. In the authors' code more tokens reach it, and the budget is
    the mean over both stages.
    """

    name = "flashvid-inner"
    source = "arXiv 2602.08024"
    default_share = 0.3

    depth: Part = 20 / 28
