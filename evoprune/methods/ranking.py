"""Functions that rank tokens and match rows to merge. Ties always go to the lower index."""

import torch

from evoprune.methods.types import arange_on


def highest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 `[count]`: the indices of the highest entries of `score` (`[n]`), ascending. Ties go to the lower index."""
    return score.argsort(descending=True, stable=True)[:count].sort().values


def alternate(valid: torch.Tensor, first: int = 1) -> torch.Tensor:
    """Choose the source rows of a merge round: bool `[B, n]`, True for every second valid row of a group.

    `first` (0 or 1) is the index of the first source row.
    """
    return (arange_on(valid.shape[1], valid.device) % 2 == first) & valid


def match(
    best: torch.Tensor, partner: torch.Tensor, source: torch.Tensor, last: torch.Tensor, remove: torch.Tensor
) -> torch.Tensor:
    """Return int64 `[B, n]`: the index of the row that each row merges into. A row that stays gets its own index.

    Sources with the highest scores merge first.

    Args:
        best, partner: `[B, n]`, the results of `best_partners` for all rows.
        source: bool `[B, n]`, True for rows that may merge into another row.
        last: bool `[B, n]`, True for critical rows, which merge only after all other sources.
        remove: int64 `[B]`, the number of sources to merge. If there are fewer sources, all of them merge.
    """
    b, n = source.shape
    # The order is: sources by score, then critical sources, then all other rows. The sorts are stable, so ties go to the lower
    # index.
    order = best.argsort(dim=1, descending=True, stable=True)
    late = (last & source).gather(1, order).to(torch.int8) + 2 * (~source).gather(1, order).to(torch.int8)
    order = order.gather(1, late.argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, arange_on(n, source.device).expand(b, n))
    goes = source & (rank < torch.minimum(remove, source.sum(1))[:, None])
    return torch.where(goes, partner, arange_on(n, source.device))
