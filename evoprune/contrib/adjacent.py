"""The `adjacent` method, based on StreamingAssistant, which drops spatially redundant tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import Cosine, dissimilarity, ranked
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap


@dataclass(frozen=True)
class Adjacent(Selector):
    """Drops spatially redundant tokens. Based on StreamingAssistant (arXiv 2512.12560), which has no public code.

    A token's redundancy is its highest cosine similarity to a neighbor in the frame, where the neighbors are the nearest remaining
    tokens above, below, left, and right. The most redundant tokens are dropped in rounds until K tokens remain, but no two
    neighbors are dropped in the same round.

    Differences from the paper: this project adds a first step that drops each token whose cosine similarity to the token at the
    same position in the previous frame pair is above `still`.
    """

    name = "adjacent"
    source = "after arXiv 2512.12560"

    still: Cosine = 0.9  # cosine above which a token repeats the previous frame pair; 1 disables this step

    def scores(self, tokens: Tokens) -> torch.Tensor:
        left = torch.ones(tokens.grid, dtype=torch.bool, device=tokens.rows.device)
        return -redundancy(tokens.normalised, neighbours(left))

    def select(self, tokens: Tokens, keep: int) -> Selection:
        unit = tokens.normalised
        left = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
        like = 1 - dissimilarity(tokens)
        like[0] = -1  # the first frame pair has no predecessor
        repeated = ranked(like.flatten())[: min(len(unit) - keep, int((like > self.still).sum()))]
        left[repeated] = False
        while (more := int(left.sum()) - keep) > 0:
            near = neighbours(left.view(tokens.grid))
            left[highest_apart(redundancy(unit, near).masked_fill(~left, -torch.inf), near, more)] = False
        return Selection(left.nonzero().flatten())


def neighbours(left: torch.Tensor) -> torch.Tensor:
    """Find each token's nearest remaining neighbors above, below, left, and right.

    Args:
        left: bool `[T, H, W]`, True for remaining tokens.

    Returns:
        int64 `[N, 4]`, with -1 for missing neighbors.
    """
    index = torch.where(left, arange_on(left.numel(), left.device).view_as(left), -1)
    last = left.numel()
    sides = []
    for dim in (1, 2):
        before = index.cummax(dim).values.roll(1, dim)  # indices increase along both dimensions
        before.select(dim, 0).fill_(-1)
        after = torch.where(index < 0, last, index).flip(dim).cummin(dim).values.roll(1, dim)
        after.select(dim, 0).fill_(last)
        after = after.flip(dim)
        sides += [before, torch.where(after == last, -1, after)]
    return torch.stack(sides, -1).view(-1, 4)


def redundancy(unit: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Return each token's highest cosine similarity to a neighbor, or -2 for tokens without neighbors: float32 `[N]`.

    Args:
        unit: `[N, D]`, unit-length tokens.
        near: int64 `[N, 4]`, the result of `neighbours`.
    """
    cosines = [snap((unit * unit[to.clamp(min=0)]).sum(1)).masked_fill(to < 0, -2) for to in near.unbind(1)]
    return torch.stack(cosines).amax(0)


def highest_apart(score: torch.Tensor, near: torch.Tensor, count: int) -> torch.Tensor:
    """Select the highest-scoring tokens, skipping any token that is a neighbor of a token already selected.

    Args:
        score: `[N]`, -inf for ineligible tokens.
        near: int64 `[N, 4]`, the result of `neighbours`.
        count: The maximum number of tokens to select.

    Returns:
        int64, the indices of the selected tokens. Ties go to the lower index.
    """
    outside = len(score)  # ranks after all tokens; a missing neighbor's index of -1 refers to this last entry
    order = torch.empty_like(near[:, 0]).index_copy_(0, ranked(score), arange_on(outside, score.device))
    order = F.pad(order.masked_fill(score == -torch.inf, outside), (0, 1), value=outside)
    open_ = order.clone()
    taken = torch.zeros_like(order, dtype=torch.bool)
    while (open_ < outside).any():  # a token that ranks above all its open neighbors is certain to be selected
        taken[:-1] |= (open_[:-1] < outside) & (open_[:-1] < open_[near].amin(1))
        open_[:-1].masked_fill_(taken[:-1] | taken[near].any(1), outside)
    chosen = taken.nonzero().flatten()
    return chosen[order[chosen].argsort()[:count]]
