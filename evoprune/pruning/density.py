"""Density peaks (Rodriguez and Laio, Science 344, 2014): tokens that other tokens gather around.

A peak has near neighbours (a high density) and is far from all denser tokens. Distances are between tokens of length
one, because the length of a token depends on the projector more than on the picture. Cosines and densities are rounded,
and of equally dense tokens the first counts as denser, so one of several equal tokens is a peak. Many implementations
add noise instead. The public code of the methods that use peaks divides distances by sqrt(D), and counts a token among
its own neighbours; this code does neither.
"""

import torch
import torch.nn.functional as F

from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import BLOCK, highest, nearest
from evoprune.pruning.score import snap


def peaks(unit: torch.Tensor, count: int, neighbours: int) -> torch.Tensor:
    """int64 `[count]`, ascending: the rows of `unit` (`[n, D]`, of length one) with the highest peak scores; ties by index."""
    return highest(peak_scores(unit, neighbours), count) if count else ascending(0, unit.device)


def joined_peaks(unit: torch.Tensor, count: int, neighbours: int) -> torch.Tensor:
    """int64 `[n]`: the most similar of the `count` peaks to each row of `unit` (`[n, D]`, of length one); a peak joins itself."""
    centres = peaks(unit, count, neighbours)
    return centres[nearest(unit, unit[centres])].index_copy(0, centres, centres)


def join_groups(
    into: torch.Tensor, features: torch.Tensor, groups: list[torch.Tensor], counts: list[int], neighbours: int
) -> None:
    """Merges the tokens of each group around density peaks; writes the result to `into`.

    Args:
        into: int64 `[N]`, the unit that each unit joins.
        features: float32 `[N, D]`.
        groups: int64 `[m, g]` each: m tokens, each the mean of g units.
        counts: tokens to keep of each group; a group that keeps none is left out of `into`.
        neighbours: as in `peak_scores`.
    """
    for group, count in zip(groups, counts, strict=True):
        if count:
            to = joined_peaks(F.normalize(features[group].mean(1), dim=1), count, neighbours)
            into[group] = group[to, :1].expand(group.shape)


def peak_scores(unit: torch.Tensor, neighbours: int) -> torch.Tensor:
    """float32 `[n]`: density times the distance to the nearest denser row; for the densest row, to the farthest row.

    Density is exp(-m), where m is the mean squared distance to the `neighbours` nearest other rows. O(n^2 D), memory O(n).
    """
    n = len(unit)
    index = ascending(n, unit.device)
    blocks = index.split(BLOCK)
    nearest = min(neighbours, n - 1)
    density = torch.ones(n, dtype=torch.float32, device=unit.device)
    for block in blocks if nearest else ():
        squared = _squared(unit, block)
        squared[ascending(len(block), unit.device), block] = torch.inf
        density[block] = snap((-squared.topk(nearest, largest=False).values.mean(1)).exp())
    apart = torch.empty(n, dtype=torch.float32, device=unit.device)
    for block in blocks:
        squared = _squared(unit, block)
        denser = (density > density[block, None]) | ((density == density[block, None]) & (index < block[:, None]))
        farthest = squared.amax(1)
        apart[block] = torch.where(denser.any(1), squared.masked_fill(~denser, torch.inf).amin(1), farthest)
    return snap(density * apart.sqrt())


def _squared(unit: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
    """`[p, n]`: squared distances of the rows `some` (int64 `[p]`) to all rows; a zero row counts as orthogonal to all."""
    return (2 - 2 * snap(unit[some] @ unit.T)).clamp_(min=0)
