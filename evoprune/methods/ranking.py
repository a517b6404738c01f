"""Functions that rank tokens and match rows to merge. Ties always go to the lower index."""

import torch

from evoprune.methods.types import arange_on


def highest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 `[count]`: the indices of the `count` highest entries of `score` (`[n]`), ascending; ties to the lower index."""
    return score.argsort(descending=True, stable=True)[:count].sort().values


def alternate(valid: torch.Tensor, first: int = 1) -> torch.Tensor:
    """Return the sources of a merge round, bool `[B, n]`: every second valid row of a group, starting at row `first` (0 or 1)."""
    return (arange_on(valid.shape[1], valid.device) % 2 == first) & valid


def match(
    best: torch.Tensor, partner: torch.Tensor, source: torch.Tensor, last: torch.Tensor, remove: torch.Tensor
) -> torch.Tensor:
    """Return int64 `[B, n]`: the row that each row merges into, or its own index if it stays.

    The highest-scoring sources merge first.

    Args:
        best, partner: `[B, n]`, from `best_partners`, for all rows.
        source: bool `[B, n]`, rows that may merge into another.
        last: bool `[B, n]`, critical rows, which merge only after all other sources.
        remove: int64 `[B]`, the number of sources that merge; all of them if there are fewer.
    """
    b, n = source.shape
    # The order: sources by score, then critical sources, then all other rows. The stable sorts give ties to the lower index.
    order = best.argsort(dim=1, descending=True, stable=True)
    late = (last & source).gather(1, order).to(torch.int8) + 2 * (~source).gather(1, order).to(torch.int8)
    order = order.gather(1, late.argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, arange_on(n, source.device).expand(b, n))
    goes = source & (rank < torch.minimum(remove, source.sum(1))[:, None])
    return torch.where(goes, partner, arange_on(n, source.device))
