"""EVS, Efficient Video Sampling (arXiv 2510.14624; `--video-pruning-rate` in vLLM): drops what repeats the frame pair before.

As in the paper: the dissimilarity of a token is 1 - cosine to the token at the same place in the frame pair before. The
first frame pair is kept whole. Of all other tokens of the video, the most dissimilar are kept, at their own positions.
So at least one whole frame pair is left: H * W tokens, even if the budget is smaller.
Adapted: cosines are rounded, so equal tokens are ties, which go by index.
`evs-nofloor` is this project's variant: the first frame pair is compared with the second, so every budget can be
reached.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.ranking import highest
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Evs(Selector):
    """O(N D). No fields."""

    name: ClassVar[str] = "evs"
    source: ClassVar[str] = "arXiv 2510.14624"
    exact: ClassVar[bool] = False

    def select(self, tokens: Tokens, keep: int) -> Selection:
        change = dissimilarity(tokens)
        change[0] = torch.inf
        return Selection(highest(change.flatten(), max(keep, change.shape[1])))


@dataclass(frozen=True)
class EvsNoFloor(Evs):
    """O(N D). No fields."""

    name: ClassVar[str] = "evs-nofloor"
    source: ClassVar[str] = "this project; after arXiv 2510.14624"
    exact: ClassVar[bool] = True

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return dissimilarity(tokens).flatten()

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(highest(self.scores(tokens), keep))


def dissimilarity(tokens: Tokens) -> torch.Tensor:
    """float32 `[T, H * W]`: 1 - cosine of each token to the same place in the frame pair before.

    The first frame pair is compared with the second; 0 if there is only one.
    """
    pairs = tokens.features.view(tokens.grid[0], -1, tokens.features.shape[1])
    later = 1 - snap(torch.cosine_similarity(pairs[1:].float(), pairs[:-1].float(), dim=-1))
    first = later[:1] if len(later) else torch.zeros(pairs.shape[:2], dtype=torch.float32, device=pairs.device)
    return torch.cat([first, later])
