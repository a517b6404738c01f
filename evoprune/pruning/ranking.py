"""Functions that rank tokens, shared by the methods. Ties go by index everywhere."""

from collections.abc import Callable, Iterable

import torch

from evoprune.pruning.indices import ascending
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection

BLOCK = 512  # rows of an N x N matrix that are held at a time


def ranked(score: torch.Tensor) -> torch.Tensor:
    """int64 `[n]`: indices of `score` (`[n]`) from the highest to the lowest; ties by index."""
    return score.argsort(descending=True, stable=True)


def highest(score: torch.Tensor, count: int) -> torch.Tensor:
    """int64 `[count]`: indices of the `count` highest of `score` (`[n]`), ascending; ties to the lower index."""
    return ranked(score)[:count].sort().values


def relative(score: torch.Tensor) -> torch.Tensor:
    """The logarithm of `score` (at least 0), rounded: scores that differ by less than a ten-thousandth of themselves are ties."""
    return snap(score.log())


def scaled(score: torch.Tensor) -> torch.Tensor:
    """`score` scaled linearly to reach from 0 to 1; all 0 if it is the same everywhere."""
    low, high = score.min(), score.max()
    return (score - low) / torch.where(high > low, high - low, torch.ones_like(high))


def closest(unit: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 `[n]`, the greatest cosine of each row of `unit` (`[n, d]`) to one of `others` (`[m, d]`); int64 `[n]`, its index.

    All rows are of length one, and m is at least 1. Ties go to the lower index.
    """
    found = [snap(some @ others.T).max(1) for some in unit.split(BLOCK)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def greedy(
    unit: torch.Tensor, near: torch.Tensor, keep: int, score: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """int64 `[keep]`, ascending: rows of `unit` (`[N, D]`), one after another that of the highest score; ties by index.

    Args:
        near: float32 `[N]`, what the first is scored by.
        score: from the greatest cosine of each row to the selected ones to its score, `[N]` both.
    """
    selected = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    for step in range(keep):
        latest = score(near).masked_fill(selected, -torch.inf).argmax()[None]
        selected.index_fill_(0, latest, True)  # an index in brackets would synchronise a GPU
        cosine = snap(unit @ unit.index_select(0, latest)[0])
        near = torch.maximum(near, cosine) if step else cosine
    return selected.nonzero().flatten()


def of_pairs(kept: Iterable[torch.Tensor], per_pair: int) -> Selection:
    """The selection of what each frame pair keeps: for each the places, int64, ascending, of its `per_pair`."""
    return Selection(torch.cat([places + pair * per_pair for pair, places in enumerate(kept)]))


def gathered(into: torch.Tensor, weight: torch.Tensor | None = None) -> Selection:
    """The selection in which each unit joins the unit `into` (int64 `[N]`); a unit stays if it joins itself, -1 drops it.

    `weight`, float32 `[N]`, is the weight of each unit in its mean; None for equal weights.
    """
    stays = into == ascending(len(into), into.device)
    number = stays.cumsum(0) - 1
    return Selection(stays.nonzero().flatten(), torch.where(into < 0, -1, number[into]), weight)


def centre_weights(into: torch.Tensor, least: float) -> torch.Tensor:
    """float32 `[N]`: the weight of each unit in the mean that it joins; `into` as in `gathered`.

    A unit that n others join has weight max(1 / (n + 1), `least`), and the n share the rest evenly; alone it has weight 1.
    """
    stays = into == ascending(len(into), into.device)
    others = torch.bincount(into[(into >= 0) & ~stays], minlength=len(into))[into.clamp(min=0)]
    own = torch.where(others > 0, (1 / (others + 1).float()).clamp(min=least), 1.0)
    return torch.where(stays, own, (1 - own) / others.clamp(min=1))
