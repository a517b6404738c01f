"""HoliTom (arXiv 2505.21334), its part before the language model: segments that save most by averaging what stands still.

Faithful: a place stands still in a segment if each of its tokens is similar to the next, cosine above 0.8; of all ways to cut
the video, dynamic programming finds one in which most tokens are saved; what stands still becomes one token, the mean, at its
first grid. Then of the others in each grid the most attended ones are kept, and the means of a segment are merged around
density peaks. Adapted: the budget holds exactly and is shared out by how many tokens there are; where standing still saves more
than is to be saved, only the stillest places are averaged, the last of them over fewer grids; of ways that save equally much
the one with the longest last segments is taken. Attention is that received at the tower's last layer that sees whole grids.
Left out: merging inside the language model.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import apportion
from evoprune.pruning.density import peaks
from evoprune.pruning.ranking import gathered, highest, nearest
from evoprune.pruning.score import snap
from evoprune.pruning.segments import averaged
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class HoliTom(Selector):
    """O(N D + T^2 + N n D / L) for n tokens a grid and segments of L grids, memory O(N D). Fields:

    static: cosine of a token to the next at its place above which the place stands still.
    neighbours: of which densities are made.
    """

    name: ClassVar[str] = "holitom"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    static: float = 0.8
    neighbours: int = 7

    def __post_init__(self):
        if not -1 <= self.static <= 1 or self.neighbours < 1:
            raise ValueError("static is a cosine, neighbours at least 1")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.features.float().view(tokens.grid[0], -1, tokens.features.shape[1])
        index = torch.arange(len(tokens.owner), device=x.device).view(x.shape[:2])
        like = snap(torch.cosine_similarity(x[1:], x[:-1], dim=2))
        parts = most_saving(like > self.static)
        alike = [stillness(like, part, index.shape[1]) for part in parts]
        saved = sum(
            int((still > self.static).sum()) * (len(part) - 1) for part, still in zip(parts, alike, strict=True)
        )
        if index.numel() - saved <= keep:
            return gathered(averaged(index, parts, alike, index.numel() - keep).flatten())
        attention = snap(tokens.attention).view(index.shape)
        into, weight = torch.full_like(index, -1).flatten(), torch.ones(index.shape, device=x.device)
        groups, moving = [], []  # the units of each token that stands still, a row each; the others of each grid
        for part, still in zip(parts, alike, strict=True):
            still = still > self.static
            weight[part.start : part.stop, still] = 1 / len(part)
            groups.append(index[part.start : part.stop, still].T)
            moving += [index[grid, ~still] for grid in part]
        sizes = [len(group) for group in (*groups, *moving)]
        counts = apportion(keep, sizes, sizes)
        x = x.flatten(0, 1)
        for group, count in zip(groups, counts, strict=False):
            if count:
                unit = F.normalize(x[group].mean(1), dim=1)
                centres = peaks(unit, count, self.neighbours)
                to = centres[nearest(unit, unit[centres])].index_copy(0, centres, centres)
                into[group] = group[to, :1].expand(group.shape)
        for some, count in zip(moving, counts[len(groups) :], strict=True):
            best = some[highest(attention.flatten()[some], count)]
            into[best] = best
        return gathered(into, weight.flatten())


def most_saving(same: torch.Tensor) -> list[range]:
    """The segments in which most tokens are saved; `same`: bool `[T - 1, n]`, whether a token is similar to the next.

    A segment of L grids saves L - 1 tokens for each place that never changes in it.
    """
    back, backs = torch.zeros(same.shape[1], dtype=torch.int64, device=same.device), []
    for each in same:  # for how many grids before this one nothing has changed
        back = (back + 1) * each
        backs.append(torch.bincount(back, minlength=len(same) + 1))
    never = torch.stack(backs).flip(1).cumsum(1).flip(1).tolist() if backs else []  # at least so many grids
    best, start = [0, 0], [0, 0]  # of the first grids: what is saved, and where the last segment begins
    for last in range(1, len(same) + 1):
        saves = [best[first] + (last - first) * never[last - 1][last - first] for first in range(last)]
        saves.append(best[last])
        best.append(max(saves))
        start.append(saves.index(best[-1]))
    parts, stop = [], len(same) + 1
    while stop:
        parts.append(range(start[stop], stop))
        stop = start[stop]
    return parts[::-1]


def stillness(like: torch.Tensor, part: range, places: int) -> torch.Tensor:
    """float32 `[n]`: the least cosine of a token to the next at each place of a segment; -inf for one grid."""
    if len(part) == 1:
        return torch.full((places,), -torch.inf, device=like.device)
    return like[part.start : part.stop - 1].amin(0)
