"""PruneVid's second stage, which keeps the tokens that receive the most attention from a single text token."""

from dataclasses import dataclass

import torch

from evoprune.contrib.shared import Part, apportion, relative
from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, Selection, arange_on, highest, one_drop


@dataclass(frozen=True)
class PruneVidInner(LanguageMethod):
    """PruneVid's second stage (arXiv 2412.16117, section 3.3), inside the language model: keeps tokens to which text attends.

    After the first `depth` fraction of the layers, a token's score is the highest attention that it receives from any text token
    after the video, in any head. This attention is computed without rotary embeddings or a causal mask. Each frame pair keeps its
    highest-scoring tokens, in proportion to its token count.

    Differences from the authors' code: here, tokens compete within their frame pair. In the authors' code, the moving tokens of a
    frame compete with each other, as do the static tokens of a segment.
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
