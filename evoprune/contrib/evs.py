"""EVS (`--video-pruning-rate` in vLLM), which keeps the tokens that change most over time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from evoprune.contrib.shared import dissimilarity
from evoprune.methods import Selection, Selector, Tokens, highest


@dataclass(frozen=True)
class Evs(Selector):
    """EVS (arXiv 2510.14624): keeps the tokens that change most over time.

    A token's score is 1 minus its cosine similarity to the token at the same position in the previous frame pair. The
    highest-scoring tokens of the whole video are kept.

    If `floor` is True, the entire first frame pair is kept, as in vLLM, even if it exceeds the budget.
    """

    name = "evs"
    source = "arXiv 2510.14624"

    floor: bool = True  # whether to keep the entire first frame pair, even if it exceeds the budget

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
    """EVS without the guarantee for the first frame pair, which is compared with the second one and can also lose tokens."""

    name = "evs-nofloor"

    floor: bool = False
