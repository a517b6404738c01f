"""Selectors by change over time and space: EVS (`--video-pruning-rate` in vLLM), adjacent, VidCom2."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.plans import apportion
from evoprune.methods.ranking import highest, of_pairs, ranked, snap
from evoprune.methods.settings import Cosine
from evoprune.methods.types import Selection, Tokens, arange_on


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
    """Follow the paper: the first frame pair has no right to stay."""

    name = "evs-nofloor"

    floor: bool = False


def dissimilarity(tokens: Tokens) -> torch.Tensor:
    """Return float32 `[T, H * W]`: 1 - cosine of each token to the same place in the frame pair before.

    The first frame pair is compared with the second; 0 if there is only one.
    """
    pairs = tokens.features.view(tokens.grid[0], -1, tokens.features.shape[1])
    later = 1 - snap(torch.cosine_similarity(pairs[1:].float(), pairs[:-1].float(), dim=-1))
    if len(later) == 0:
        return torch.zeros(pairs.shape[:2], dtype=torch.float32, device=pairs.device)
    return torch.cat([later[:1], later])


@dataclass(frozen=True)
class Adjacent(Selector):
    """After StreamingAssistant: drops what its neighbours repeat, and never two neighbours at once."""

    name = "adjacent"
    source = "after arXiv 2512.12560"

    still: Cosine = 0.9  # above it, a token repeats its place in the frame pair before; 1 for no redundancy in time

    def scores(self, tokens: Tokens) -> torch.Tensor:
        left = torch.ones(tokens.grid, dtype=torch.bool, device=tokens.rows.device)
        return -redundancy(tokens.normalised, neighbours(left))

    def select(self, tokens: Tokens, keep: int) -> Selection:
        unit = tokens.normalised
        left = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
        like = 1 - dissimilarity(tokens)
        like[0] = -1  # nothing is before the first frame pair
        repeated = ranked(like.flatten())[: min(len(unit) - keep, int((like > self.still).sum()))]
        left[repeated] = False
        while (more := int(left.sum()) - keep) > 0:
            near = neighbours(left.view(tokens.grid))
            left[highest_apart(redundancy(unit, near).masked_fill(~left, -torch.inf), near, more)] = False
        return Selection(left.nonzero().flatten())


def neighbours(left: torch.Tensor) -> torch.Tensor:
    """Return int64 `[N, 4]`: the nearest of the tokens `left` (bool `[T, H, W]`) above, below, left and right of each; -1 for
    none.
    """
    index = torch.where(left, arange_on(left.numel(), left.device).view_as(left), -1)
    last = left.numel()
    sides = []
    for dim in (1, 2):
        before = index.cummax(dim).values.roll(1, dim)  # indices rise along both dimensions
        before.select(dim, 0).fill_(-1)
        after = torch.where(index < 0, last, index).flip(dim).cummin(dim).values.roll(1, dim)
        after.select(dim, 0).fill_(last)
        after = after.flip(dim)
        sides += [before, torch.where(after == last, -1, after)]
    return torch.stack(sides, -1).view(-1, 4)


def redundancy(unit: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Return float32 `[N]`: the greatest cosine of each token (`[N, D]`) to its neighbours (int64 `[N, 4]`), -2 without any."""
    cosines = [snap((unit * unit[to.clamp(min=0)]).sum(1)).masked_fill(to < 0, -2) for to in near.unbind(1)]
    return torch.stack(cosines).amax(0)


def highest_apart(score: torch.Tensor, near: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64, `count` or fewer: the tokens of highest `score` (`[N]`, -inf for none), without neighbours of those taken
    before.

    `near`: from `neighbours`. Ties go to the lower index.
    """
    outside = len(score)  # later than all; index -1 finds it, where a token has no neighbour
    order = torch.empty_like(near[:, 0]).index_copy_(0, ranked(score), arange_on(outside, score.device))
    order = F.pad(order.masked_fill(score == -torch.inf, outside), (0, 1), value=outside)
    open_ = order.clone()
    taken = torch.zeros_like(order, dtype=torch.bool)
    while (open_ < outside).any():  # a token that comes before all of its open neighbours is certain to be taken
        taken[:-1] |= (open_[:-1] < outside) & (open_[:-1] < open_[near].amin(1))
        open_[:-1].masked_fill_(taken[:-1] | taken[near].any(1), outside)
    chosen = taken.nonzero().flatten()
    return chosen[order[chosen].argsort()[:count]]


SCALES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
TEMPERATURE = 0.01


@dataclass(frozen=True)
class VidCom2(Selector):
    name = "vidcom2"
    source = "arXiv 2505.14454"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        variance = tokens.features.float().var(0, correction=0)
        steady = highest(-variance, -(-len(variance) // 2))  # half of the channels
        unit = tokens.by_pair(F.normalize(tokens.features[:, steady].float(), dim=1))
        pairs, per_pair = unit.shape[:2]
        like_video = likeness(unit, unit.mean((0, 1), keepdim=True))
        like_pair = likeness(unit, unit.mean(1, keepdim=True))
        unlike = (-snap(like_video.mean(1)).double() / TEMPERATURE).softmax(0)
        weights = pairs * (1 + snap(unlike)) - 1  # T times the share, rounded: equal shares stay equal
        shares = apportion(keep, weights.tolist(), [per_pair] * pairs)
        return of_pairs(map(highest, -snap(like_video + like_pair), shares), per_pair)


def likeness(unit: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Return `[T, n]` in (0, 5]: the affinity of tokens `unit` (`[T, n, D]`) to `mean` (`[T or 1, 1, D]`)."""
    distance = (unit - mean).square().sum(2)
    return sum((-distance / (2 * scale)).exp() for scale in SCALES)
