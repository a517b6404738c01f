"""Nüwa's second stage, which keeps the tokens that receive the most attention from a single head of the language model."""

from dataclasses import dataclass

import torch

from evoprune.contrib.shared import Part
from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, one_drop


@dataclass(frozen=True)
class NuwaInner(LanguageMethod):
    """Nüwa's second stage (arXiv 2602.02951), inside the language model: keeps tokens to which at least one head attends.

    After the first `depth` fraction of the layers, a token's score is its mean attention from the last three prompt tokens, in the
    head where this mean is highest. The highest-scoring tokens are kept.

    Differences from the authors' code: `-b` specifies the fraction of tokens that reach the language model. The authors' code uses
    only one frame pair of a video.
    """

    name = "nuwa-inner"
    source = "arXiv 2602.02951"
    default_share = 0.42

    depth: Part = 15 / 28

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        return tokens.last_weights(3)[:, tokens.visual].amax(0)
