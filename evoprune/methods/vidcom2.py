"""VidCom2 (arXiv 2505.14454): frame pairs that differ from the rest of the video get more tokens.

As in the paper: it uses the half of the channels with the lowest variance, each token at length one. The affinity of a
token to a mean is the sum of exp(-d^2 / 2a) for a = 1/8, 1/4, 1/2, 1 and 2, where d is its distance to the mean. Frame
pairs share the budget by their mean affinity to the mean of the video: R * (1 + u - 1/T), where R is the even share of
T frame pairs and u the softmax of the negative affinity at temperature 0.01. Each frame pair keeps the tokens with the
lowest affinity to the video's mean and its own.
Adapted: shares are whole numbers by largest remainder, and a share that exceeds a frame pair goes to the others.
Affinities are rounded, so equal tokens are ties, which go by index.
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
    """O(N D). No fields."""

    name: ClassVar[str] = "vidcom2"
    source: ClassVar[str] = "arXiv 2505.14454"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        unit = F.normalize(tokens.features[:, steadiest(tokens.features)].float(), dim=1).view(pairs, per_pair, -1)
        like_video = likeness(unit, unit.mean((0, 1), keepdim=True))
        like_pair = likeness(unit, unit.mean(1, keepdim=True))
        unlike = (-snap(like_video.mean(1)).double() / TEMPERATURE).softmax(0)
        weights = pairs * (1 + snap(unlike)) - 1  # T times the share, rounded: equal shares stay equal
        shares = apportion(keep, weights.tolist(), [per_pair] * pairs)
        unlike = -snap(like_video + like_pair)
        return Selection(
            torch.cat([highest(unlike[pair], share) + pair * per_pair for pair, share in enumerate(shares)])
        )


def steadiest(features: torch.Tensor) -> torch.Tensor:
    """int64 `[ceil(D / 2)]`, ascending: the channels of `features` (`[N, D]`) with the least variance; ties by index."""
    variance = features.float().var(0, correction=0)
    return highest(-variance, -(-len(variance) // 2))


def likeness(unit: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`[T, n]` in (0, 5]: the affinity of tokens `unit` (`[T, n, D]`) to `mean` (`[T or 1, 1, D]`)."""
    distance = (unit - mean).square().sum(2)
    return sum((-distance / (2 * scale)).exp() for scale in SCALES)
