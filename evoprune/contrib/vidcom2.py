"""The VidCom2 method, which keeps more tokens in unusual frame pairs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import apportion
from evoprune.methods import Selection, Selector, Tokens, highest, snap

SCALES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
TEMPERATURE = 0.01


@dataclass(frozen=True)
class VidCom2(Selector):
    """VidCom2 (arXiv 2505.14454): unusual frame pairs get more tokens, and each frame pair keeps its most unusual tokens.

    A token's affinity to a mean is the sum of exp(-distance^2 / (2 scale)) over five scales, computed from the half of the channels
    with the lowest variance. Each of the T frame pairs gets tokens in proportion to 1 - 1 / T + s, where s is the softmax over
    frame pairs of the negative mean affinity to the video's mean, at a temperature of 0.01. A frame pair keeps the tokens with the
    lowest combined affinity to the video's mean and to the frame pair's own mean.

    Differences from the authors' code: the authors round each frame pair's count independently. Here, the counts add up to the
    budget.
    """

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
        # T times each frame pair's share, rounded so that equal shares stay equal.
        weights = pairs * (1 + snap(unlike)) - 1
        shares = apportion(keep, weights.tolist(), [per_pair] * pairs)
        return Selection.of_pairs(map(highest, -snap(like_video + like_pair), shares), per_pair)


def likeness(unit: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Return the affinity, in (0, 5], of the tokens in `unit` (`[T, n, D]`) to `mean` (`[T or 1, 1, D]`), as `[T, n]`."""
    distance = (unit - mean).square().sum(2)
    return sum((-distance / (2 * scale)).exp() for scale in SCALES)
