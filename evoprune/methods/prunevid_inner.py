"""PruneVid's stage inside the language model (arXiv 2412.16117, section 3.3): what the question attends to stays.

After 11 of 32 layers a token's score is the greatest attention that any head of any text token behind the video gives to it. As in
the authors' code, this attention is computed without rotary positions and without a causal mask. Each frame pair keeps its best.
Adapted: their groups are the moving tokens of a frame and the still ones of a segment, which are known only behind their own
first stage; here they are frame pairs, with shares by largest remainder. Left out: their code also removes the tokens from the
caches of the layers before.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evoprune.methods.fastv import FastV
from evoprune.pruning.budget import apportion
from evoprune.pruning.indices import ascending
from evoprune.pruning.layer_tokens import LayerTokens
from evoprune.pruning.ranking import highest, relative
from evoprune.pruning.types import Selection


@dataclass(frozen=True)
class PruneVidInner(FastV):
    """Field: depth: as in `FastV`."""

    name: ClassVar[str] = "prunevid-inner"
    source: ClassVar[str] = "arXiv 2412.16117, section 3.3"
    default_share: ClassVar[float] = 0.4

    depth: float = 11 / 32

    def select(self, tokens: LayerTokens) -> Selection:
        queries = ascending(len(tokens.queries), tokens.visual.device)
        score = relative(tokens.unrotated().attention(queries, most=True, causal=False))
        sizes = tokens.pair.unique_consecutive(return_counts=True)[1].tolist()
        counts, pairs = apportion(tokens.left, sizes, sizes), torch.split(score, sizes)
        kept, start = [], 0
        for size, count, pair in zip(sizes, counts, pairs, strict=True):
            kept.append(highest(pair, count) + start)
            start += size
        return Selection(torch.cat(kept))
