"""What methods that rank tokens have in common. Ties go by index everywhere."""

import torch

BLOCK = 512  # rows of a matrix of all pairs that are held at a time


def highest(score: torch.Tensor, count: int) -> torch.Tensor:
    """int64 `[count]`: the indices of the highest of `score` (`[n]`), ascending; ties to the lower index."""
    return score.argsort(descending=True, stable=True)[:count].sort().values


def scaled(score: torch.Tensor) -> torch.Tensor:
    """`score` moved and stretched to reach from 0 to 1; all 0 where it is the same everywhere."""
    low, high = score.min(), score.max()
    return (score - low) / torch.where(high > low, high - low, torch.ones_like(high))
