"""VidCom2 (arXiv 2505.14454): grids unlike the rest of the video get more tokens, and keep those unlike the rest of both.

Faithful: on the half of the channels with the least variance, each token at length one, how like a token is to a mean is the sum of
exp(-d^2 / 2a) for a = 1/8, 1/4, 1/2, 1 and 2, d its distance to the mean. Grids share the budget by their mean likeness to the
mean of the video: R * (1 + u - 1/T), where R is the even share of T grids and u the softmax of what is unlike, at temperature
0.01. Each grid keeps the tokens least like the video's mean and its own. Adapted: shares are whole by largest remainder, and
what is more than a grid holds goes to the others; likenesses are rounded so that equals are ties, which go by index.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import apportion
from evoprune.pruning.ranking import highest
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens

SCALES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
TEMPERATURE = 0.01


@dataclass(frozen=True)
class VidCom2(Selector):
    """O(N D)."""

    name: ClassVar[str] = "vidcom2"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        grids, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        unit = F.normalize(tokens.features[:, steadiest(tokens.features)].float(), dim=1).view(grids, per_pair, -1)
        like_video = likeness(unit, unit.mean((0, 1), keepdim=True))
        like_grid = likeness(unit, unit.mean(1, keepdim=True))
        unlike = (-snap(like_video.mean(1)).double() / TEMPERATURE).softmax(0)
        weights = grids * (1 + snap(unlike)) - 1  # T times the share, in steps: equals stay equal
        shares = apportion(keep, weights.tolist(), [per_pair] * grids)
        unlike = -snap(like_video + like_grid)
        return Selection(
            torch.cat([highest(unlike[grid], share) + grid * per_pair for grid, share in enumerate(shares)])
        )


def steadiest(features: torch.Tensor) -> torch.Tensor:
    """int64 `[ceil(D / 2)]`, ascending: the channels of `features` (`[N, D]`) with the least variance; ties by index."""
    variance = features.float().var(0, correction=0)
    return highest(-variance, -(-len(variance) // 2))


def likeness(unit: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`[T, n]` in (0, 5]: of `unit` (`[T, n, D]`) to `mean` (`[T or 1, 1, D]`)."""
    distance = (unit - mean).square().sum(2)
    return sum((-distance / (2 * scale)).exp() for scale in SCALES)
