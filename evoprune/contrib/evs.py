"""EVS (`--video-pruning-rate` in vLLM): the tokens that change most over time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from evoprune.contrib.shared import dissimilarity
from evoprune.methods import Selection, Selector, Tokens, highest


@dataclass(frozen=True)
class Evs(Selector):
    """EVS (arXiv 2510.14624): keep the tokens that change most over time.

    The score of a token is 1 minus its cosine to the token at the same place one frame pair before. The highest scores in the video
    stay.

    With `floor`, as in vLLM, the first frame pair stays whole, even if the budget is smaller.
    """

    name = "evs"
    source = "arXiv 2510.14624"

    floor: bool = True  # whether the first frame pair stays whole, even if the budget is smaller

    @property
    def exact(self) -> bool:
        return not self.floor

    @property
    def scores(self) -> Callable[[Tokens], torch.Tensor] | None:
        if self.floor:
            return None
        return lambda tokens: dissimilarity(tokens).flatten()

    def select(self, tokens: Tokens, keep: int) -> Selection:
        change = dissimilarity(tokens)
        if self.floor:
            change[0] = torch.inf
            keep = max(keep, change.shape[1])
        return Selection(highest(change.flatten(), keep))


@dataclass(frozen=True)
class EvsNoFloor(Evs):
    """EVS without `floor`: the first frame pair is compared with the second one, and has no guarantee to stay."""

    name = "evs-nofloor"

    floor: bool = False
