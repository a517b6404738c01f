"""PruneVid, second stage: tokens that receive the most attention from some word of the text."""

from dataclasses import dataclass

import torch

from evoprune.contrib.shared import Part, apportion, relative
from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, Selection, arange_on, highest, one_drop


@dataclass(frozen=True)
class PruneVidInner(LanguageMethod):
    """PruneVid (arXiv 2412.16117, section 3.3), the stage inside the language model: tokens that the text attends to.

    After a share `depth` of the layers, a token's score is the most attention that any text token after the video pays to it in any
    head, without rotary embedding and causal mask. A frame pair keeps its highest scores, in proportion to its tokens.

    What differs: the authors' groups are the moving tokens of a frame and the still ones of a segment, here frame pairs.
    """

    name = "prunevid-inner"
    source = "arXiv 2412.16117, section 3.3"
    default_share = 0.4

    depth: Part = 11 / 32

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        queries = arange_on(len(tokens.queries), tokens.visual.device)
        return tokens.unrotated().attention(queries, most=True, causal=False)

    def select(self, tokens: LayerTokens) -> Selection:
        index = arange_on(len(tokens.pair), tokens.pair.device)
        score = relative(self.score(tokens))
        sizes = tokens.pair.unique_consecutive(return_counts=True)[1].tolist()
        counts = apportion(tokens.left, sizes, sizes)
        kept = [pair[highest(score[pair], count)] for pair, count in zip(index.split(sizes), counts, strict=True)]
        return Selection(torch.cat(kept))
