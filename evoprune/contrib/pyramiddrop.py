"""PyramidDrop: fewer tokens after each quarter of the layers."""

from dataclasses import dataclass

import torch

from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, several_drops


@dataclass(frozen=True)
class PyramidDrop(LanguageMethod):
    """PyramidDrop (arXiv 2410.17247, section 3.2): the same share of the tokens stays after each quarter of the layers.

    After a quarter, half and three quarters of the layers, the tokens stay that receive the most attention from the last token in
    the next layer. All drops leave the same share, chosen so that the mean over the later layers is the budget.

    What differs: positions stay as they are; the authors' code renumbers them.
    """

    name = "pyramiddrop"
    source = "arXiv 2410.17247, section 3.2"
    default_share = 7 / 24  # (1/2 + 1/4 + 1/8) / 3: every drop leaves half of the tokens

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return several_drops(depth, tokens, (0.25, 0.5, 0.75), lambda share: (share, share**2, share**3), budget)

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        return tokens.following().attention()
