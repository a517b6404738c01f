"""Functions that rank tokens and match rows to merge. Ties always go to the lower index."""

import torch

from evoprune.methods.types import arange_on


def highest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the `count` highest scores, in ascending order: int64 `[count]`. Ties go to the lower index.

    Args:
        score: `[n]`, one score per token.
        count: The number of tokens to keep.
    """
    return score.argsort(descending=True, stable=True)[:count].sort().values


def alternate(valid: torch.Tensor, first: int = 1) -> torch.Tensor:
    """Mark every second row in a group as a source, that is, a row that may merge into another row.

    Args:
        valid: bool `[B, n]`, False for padding.
        first: The index of the first source row, 0 or 1.

    Returns:
        bool `[B, n]`, True for source rows.
    """
    return (arange_on(valid.shape[1], valid.device) % 2 == first) & valid


def match(
    best: torch.Tensor, partner: torch.Tensor, source: torch.Tensor, last: torch.Tensor, remove: torch.Tensor
) -> torch.Tensor:
    """Merge the source rows with the highest scores into their best partners.

    Args:
        best, partner: `[B, n]`, each row's highest score and the index of the corresponding row, from `best_partners`.
        source: bool `[B, n]`, True for rows that may merge into another row.
        last: bool `[B, n]`, True for critical rows, which merge only after all other sources.
        remove: int64 `[B]`, the number of sources to merge in each group. If a group has fewer sources, all of them merge.

    Returns:
        int64 `[B, n]`, the index of the row that each row merges into. Kept rows map to themselves.
    """
    b, n = source.shape
    # Rows are ordered as follows: sources by score, then critical sources, then all other rows. Because the sorts are stable, ties
    # go to the lower index.
    order = best.argsort(dim=1, descending=True, stable=True)
    late = (last & source).gather(1, order).to(torch.int8) + 2 * (~source).gather(1, order).to(torch.int8)
    order = order.gather(1, late.argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, arange_on(n, source.device).expand(b, n))
    goes = source & (rank < torch.minimum(remove, source.sum(1))[:, None])
    return torch.where(goes, partner, arange_on(n, source.device))
