"""FastV, and the second stage of FlashVID: the most attended tokens after one layer."""

from dataclasses import dataclass

from evoprune.methods import LanguageMethod, LanguagePlan, Part, one_drop


@dataclass(frozen=True)
class FastV(LanguageMethod):
    """FastV (arXiv 2403.06764, section 4): after a few layers the most attended tokens stay.

    Once `depth` of the layers have run, the tokens stay to which the prompt's last token attends most, as the mean
    over heads.

    What differs: positions stay as they are; the authors' code renumbers them.
    """

    name = "fastv"
    source = "arXiv 2403.06764, section 4"

    depth: Part = 2 / 32  # share of the layers that run before tokens leave

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)


@dataclass(frozen=True)
class FlashVidInner(FastV):
    """FlashVID (arXiv 2602.08024), the stage inside the language model: FastV, later.

    What differs: `-b` is the share that reaches the language model. In the authors' code more reaches it, and the
    mean over both stages is the budget.
    """

    name = "flashvid-inner"
    source = "arXiv 2602.08024"
    default_share = 0.3

    depth: Part = 20 / 28
