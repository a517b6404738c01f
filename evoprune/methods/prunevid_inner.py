"""PruneVid's stage inside the language model (arXiv 2412.16117): of each frame pair, what the text attends to most stays."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evoprune.methods.fastv import FastV
from evoprune.methods.settings import Part
from evoprune.pruning.budget import apportion
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import highest, relative
from evoprune.pruning.types import LayerTokens, Selection


@dataclass(frozen=True)
class PruneVidInner(FastV):
    name: ClassVar[str] = "prunevid-inner"
    source: ClassVar[str] = "arXiv 2412.16117, section 3.3"
    default_share: ClassVar[float] = 0.4

    depth: Part = 11 / 32

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """The greatest attention of any head of any text token behind the video, without rotary and causal mask."""
        queries = ascending(len(tokens.queries), tokens.visual.device)
        return tokens.unrotated().attention(queries, most=True, causal=False)

    def select(self, tokens: LayerTokens) -> Selection:
        index, score = ascending(len(tokens.pair), tokens.pair.device), relative(self.score(tokens))
        sizes = tokens.pair.unique_consecutive(return_counts=True)[1].tolist()
        counts = apportion(tokens.left, sizes, sizes)
        kept = [some[highest(score[some], count)] for some, count in zip(index.split(sizes), counts, strict=True)]
        return Selection(torch.cat(kept))
