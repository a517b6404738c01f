"""Nüwa, second stage: the tokens that some head attends to most."""

from dataclasses import dataclass

import torch

from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, Part, one_drop


@dataclass(frozen=True)
class NuwaInner(LanguageMethod):
    """Nüwa (arXiv 2602.02951), the stage inside the language model: tokens that one head attends to.

    Once `depth` of the layers have run, a token's score is the attention that it gets from the last three columns,
    as their mean, in the head that attends to it most. The highest scores stay.

    What differs: `-b` is the share that reaches the language model. The authors' code sees only one frame pair of a
    video.
    """

    name = "nuwa-inner"
    source = "arXiv 2602.02951"
    default_share = 0.42

    depth: Part = 15 / 28

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        return tokens.last_weights(3)[:, tokens.visual].amax(0)
