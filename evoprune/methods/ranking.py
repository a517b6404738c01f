"""Functions that rank tokens and match rows to merge. Ties always go to the lower index."""

from collections.abc import Iterable

import torch

from evoprune.backend import BLOCK, snap
from evoprune.methods.types import Selection, arange_on


def ranked(score: torch.Tensor) -> torch.Tensor:
    """Return int64 `[n]`: the indices of `score` (`[n]`) from highest to lowest; ties by index."""
    return score.argsort(descending=True, stable=True)


def highest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 `[count]`: the indices of the `count` highest entries of `score` (`[n]`), ascending; ties to the lower index."""
    return ranked(score)[:count].sort().values


def scaled(score: torch.Tensor) -> torch.Tensor:
    """Return `score` scaled linearly to the range 0 to 1, or zeros if all entries are equal."""
    low = score.min()
    high = score.max()
    return (score - low) / torch.where(high > low, high - low, torch.ones_like(high))


def closest(unit: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest cosine between each row of `unit` (`[n, d]`) and any row of `others` (`[m, d]`), and its index.

    All rows have length one, and m is at least 1. Ties go to the lower index.

    Returns:
        float32 `[n]` cosines, and int64 `[n]` indices into `others`.
    """
    maxima = [snap(rows @ others.T).max(1) for rows in unit.split(BLOCK)]
    return torch.cat([piece.values for piece in maxima]), torch.cat([piece.indices for piece in maxima])


def of_pairs(kept: Iterable[torch.Tensor], per_pair: int) -> Selection:
    """Return the selection of the kept places in every frame pair.

    Args:
        kept: For each frame pair, int64 places among its `per_pair`, ascending.
    """
    return Selection(torch.cat([places + pair * per_pair for pair, places in enumerate(kept)]))


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


def relative(score: torch.Tensor) -> torch.Tensor:
    """Return the rounded logarithm of `score` (at least 0), so that scores within a relative difference of 1/10,000 are ties."""
    return snap(score.log())
