"""EVS, Efficient Video Sampling (arXiv 2510.14624; `--video-pruning-rate` in vLLM): drops what repeats the frame pair before."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.ranking import highest, snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Evs(Selector):
    name = "evs"
    source = "arXiv 2510.14624"

    floor: bool = True  # whether the first frame pair stays whole, even if the budget is smaller

    @property
    def exact(self) -> bool:
        return not self.floor

    @property
    def scores(self) -> Callable[[Tokens], torch.Tensor] | None:
        return None if self.floor else lambda tokens: dissimilarity(tokens).flatten()

    def select(self, tokens: Tokens, keep: int) -> Selection:
        change = dissimilarity(tokens)
        if self.floor:
            change[0] = torch.inf
            keep = max(keep, change.shape[1])
        return Selection(highest(change.flatten(), keep))


def dissimilarity(tokens: Tokens) -> torch.Tensor:
    """float32 `[T, H * W]`: 1 - cosine of each token to the same place in the frame pair before.

    The first frame pair is compared with the second; 0 if there is only one.
    """
    pairs = tokens.features.view(tokens.grid[0], -1, tokens.features.shape[1])
    later = 1 - snap(torch.cosine_similarity(pairs[1:].float(), pairs[:-1].float(), dim=-1))
    first = later[:1] if len(later) else torch.zeros(pairs.shape[:2], dtype=torch.float32, device=pairs.device)
    return torch.cat([first, later])
