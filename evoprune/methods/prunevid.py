"""PruneVid (arXiv 2412.16117), its stage before the language model: what stands still is averaged over time, then neighbours merge.

Faithful: grids are clustered around density peaks, a quarter as many as there are; in each segment a place is static if the
cosines of each two of its tokens are above 0.8 on average, and is then one token, the mean; static tokens of a segment, and the
others of each grid, are merged around density peaks among themselves. Adapted: a segment is a run of grids of one cluster; the
paper merges to half and leaves the rest to the language model, here merging goes on to the budget, shared out by how many tokens
there are; where standing still saves more than is to be saved, only the most static places are averaged, the last of them over
fewer grids. A mean stays at the place of its peak, or of its first grid. Left out: the stage inside the language model (attention
of the question).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import apportion
from evoprune.pruning.density import peaks
from evoprune.pruning.ranking import gathered, nearest
from evoprune.pruning.score import snap
from evoprune.pruning.segments import averaged
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class PruneVid(Selector):
    """O(N n D) for n tokens a grid, memory O(N D). Fields:

    scenes: clusters of grids, as a share of the grids.
    static: mean cosine of its tokens over time above which a place is static.
    neighbours: of which densities are made.
    """

    name: ClassVar[str] = "prunevid"

    scenes: float = 0.25
    static: float = 0.8
    neighbours: int = 7

    def __post_init__(self):
        if not (0 <= self.scenes <= 1 and -1 <= self.static <= 1) or self.neighbours < 1:
            raise ValueError("scenes is a share, static a cosine, neighbours at least 1")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.features.float().view(tokens.grid[0], -1, tokens.features.shape[1])
        index = torch.arange(len(tokens.owner), device=x.device).view(x.shape[:2])
        parts = self.segments(x)
        alike = [steadiness(F.normalize(x[part.start : part.stop], dim=2)) for part in parts]
        saved = sum(int((like > self.static).sum()) * (len(part) - 1) for part, like in zip(parts, alike, strict=True))
        if index.numel() - saved <= keep:
            return gathered(averaged(index, parts, alike, index.numel() - keep).flatten())
        into, weight = torch.full_like(index, -1), torch.ones(index.shape, device=x.device)
        groups = []  # the units of each token of a group, a row each
        for part, like in zip(parts, alike, strict=True):
            still, times = like > self.static, index[part.start : part.stop]
            weight[part.start : part.stop, still] = 1 / len(part)
            groups += [times[:, still].T, *(times[grid, ~still][:, None] for grid in range(len(part)))]
        sizes = [len(group) for group in groups]
        x, into = x.flatten(0, 1), into.flatten()
        for group, count in zip(groups, apportion(keep, sizes, sizes), strict=True):
            if count:
                unit = F.normalize(x[group].mean(1), dim=1)
                centres = peaks(unit, count, self.neighbours)
                to = centres[nearest(unit, unit[centres])].index_copy(0, centres, centres)
                into[group] = group[to, :1].expand(group.shape)
        return gathered(into, weight.flatten())

    def segments(self, x: torch.Tensor) -> list[range]:
        """Runs of the grids of `x` (`[T, n, D]`) in one cluster."""
        mean = F.normalize(x.mean(1), dim=1)
        centres = peaks(mean, max(1, int(self.scenes * len(x) + 0.5)), self.neighbours)
        cluster = nearest(mean, mean[centres]).index_copy(0, centres, torch.arange(len(centres), device=x.device))
        return [range(run[0], run[-1] + 1) for run in _runs(cluster.tolist())]


def steadiness(unit: torch.Tensor) -> torch.Tensor:
    """float32 `[n]`: the mean cosine of each two tokens of a place, -inf of one; `unit`: `[g, n, D]`, of length one or zero."""
    pairs = len(unit) * (len(unit) - 1)
    if not pairs:
        return torch.full(unit.shape[1:2], -torch.inf, device=unit.device)
    return snap((unit.sum(0).square().sum(1) - unit.square().sum((0, 2))) / pairs)


def _runs(labels: list[int]) -> Iterator[list[int]]:
    """The indices of each run of equal labels."""
    return (list(run) for _, run in groupby(range(len(labels)), key=labels.__getitem__))
