"""The PyramidDrop method, which drops tokens after each quarter of the language model's layers."""

from dataclasses import dataclass

import torch

from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, several_drops


@dataclass(frozen=True)
class PyramidDrop(LanguageMethod):
    """PyramidDrop (arXiv 2410.17247, section 3.2): keeps the same fraction of the tokens after each quarter of the layers.

    After one, two, and three quarters of the layers, the method keeps the tokens that receive the most attention from the last
    token in the next layer. Each drop keeps the same fraction of the tokens, chosen so that the mean over the layers after the
    first drop meets the budget.

    Differences from the authors' code: the authors renumber the remaining tokens, while this method leaves their positions
    unchanged.
    """

    name = "pyramiddrop"
    source = "arXiv 2410.17247, section 3.2"
    default_share = 7 / 24  # (1/2 + 1/4 + 1/8) / 3, because each drop leaves half of the tokens
    attends = "next"

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return several_drops(depth, tokens, (0.25, 0.5, 0.75), lambda share: (share, share**2, share**3), budget)

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        return tokens.following().attention()
