"""What methods that rank tokens have in common. Ties go by index everywhere."""

import torch

from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection

BLOCK = 512  # rows of a matrix of all pairs that are held at a time


def ranked(score: torch.Tensor) -> torch.Tensor:
    """int64 `[n]`: indices from the highest of `score` (`[n]`) to the lowest, ties by index."""
    return score.argsort(descending=True, stable=True)


def highest(score: torch.Tensor, count: int) -> torch.Tensor:
    """int64 `[count]`: the indices of the highest of `score` (`[n]`), ascending; ties to the lower index."""
    return ranked(score)[:count].sort().values


def scaled(score: torch.Tensor) -> torch.Tensor:
    """`score` moved and stretched to reach from 0 to 1; all 0 where it is the same everywhere."""
    low, high = score.min(), score.max()
    return (score - low) / torch.where(high > low, high - low, torch.ones_like(high))


def closest(unit: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest cosine of each row of `unit` (`[n, d]`) to one of `others` (`[m, d]`), float32 `[n]`, and to which, int64 `[n]`.

    All of length one, m at least 1.
    """
    found = [snap(part @ others.T).max(1) for part in unit.split(BLOCK)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def nearest(unit: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """int64 `[n]`: which of `others` (`[m, d]`) has the greatest cosine to each row of `unit` (`[n, d]`); all of length one."""
    return closest(unit, others)[1]


def gathered(into: torch.Tensor, weight: torch.Tensor | None = None) -> Selection:
    """The selection in which each unit goes into unit `into` (int64 `[N]`), which goes into itself; -1 for none."""
    stays = into == torch.arange(len(into), device=into.device)
    number = stays.cumsum(0) - 1
    return Selection(stays.nonzero().flatten(), torch.where(into < 0, -1, number[into]), weight)
