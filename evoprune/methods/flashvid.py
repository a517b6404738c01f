"""FlashVID (arXiv 2602.08024), its stage before the language model: attended and diverse tokens, and trees of tokens through
time.

Faithful: the video is cut where neighbouring grids, pooled, are less alike than 0.9, and into 4 segments at least. 70% of the
tokens are chosen in each grid by max-min diversity in which the distance of a token counts as much as the attention it
receives. Of the others each is linked to the most similar one in the grid before, wherever that is, if their cosine is above
0.8; each tree of links becomes one token, the mean, at its earliest place; where there are more trees than tokens, they are
merged around density peaks. Adapted: the budget holds exactly: links are made from the strongest on, and only as many as it
takes, and trees of a grid are merged among themselves, shared out by how many there are. Attention is that received at the
tower's last layer that sees whole grids. Left out: the stage inside the language model, and the relevance to an event that the
paper adds for other models than Qwen2.5-VL.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.divprune import most_diverse
from evoprune.pruning.budget import apportion, spread
from evoprune.pruning.density import peaks
from evoprune.pruning.ranking import closest, gathered, nearest, ranked
from evoprune.pruning.score import snap
from evoprune.pruning.segments import segments, transitions
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class FlashVid(Selector):
    """O(N n D) for n tokens a grid, memory O(N D). Fields:

    segments: how many there are at least. threshold: similarity of neighbouring grids below which there is always a cut.
    diverse: share of the tokens chosen by attention and diversity.
    link: cosine above which a token may be linked to one of the grid before.
    neighbours: of which densities are made.
    """

    name: ClassVar[str] = "flashvid"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    segments: int = 4
    threshold: float = 0.9
    diverse: float = 0.7
    link: float = 0.8
    neighbours: int = 7

    def __post_init__(self):
        if not (0 <= self.diverse <= 1 and -1 <= self.threshold <= 1 and -1 <= self.link <= 1):
            raise ValueError("diverse is a share, threshold and link are cosines")
        if min(self.segments, self.neighbours) < 1:
            raise ValueError("segments and neighbours are at least 1")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        grids, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        shares = spread(keep, grids)
        attention = snap(tokens.attention).view(grids, per_pair)
        x = tokens.features.float().view(grids, per_pair, -1)
        into = torch.full_like(tokens.owner, -1).view(grids, per_pair)
        weight = torch.ones(into.shape, device=x.device)
        for part in segments(transitions(tokens), self.segments, self.threshold):
            some = slice(part.start, part.stop)
            local, weight[some] = self.condensed(attention[some], x[some], sum(shares[some]))
            into[some] = torch.where(local < 0, -1, local + part.start * per_pair)
        return gathered(into.flatten(), weight.flatten())

    def condensed(self, attention: torch.Tensor, x: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each token of a segment goes, int64 `[g, n]`: itself if it stays, -1 for none; and how much it counts there.

        Args:
            attention: `[g, n]`, of its grids. x: `[g, n, D]`.
            keep: how many stay.
        """
        grids, per_pair = attention.shape
        index = torch.arange(attention.numel(), device=x.device).view(grids, per_pair)
        into = torch.full_like(index, -1).flatten()
        diverse = spread(math.floor(self.diverse * keep + 0.5), grids)
        best = torch.cat([index[g, most_diverse(x[g], count, attention[g])] for g, count in enumerate(diverse)])
        into[best] = best
        weight = torch.ones(len(into), device=x.device)
        trees = keep - len(best)
        if trees:
            x, rest = x.flatten(0, 1), (into < 0).nonzero().flatten()
            into[rest] = self.linked(F.normalize(x, dim=1), rest, rest // per_pair, len(rest) - trees)
            size = torch.bincount(into, minlength=len(into))
            weight = 1 / size[into].float()
            roots = rest[into[rest] == rest]
            if len(roots) > trees:
                mean = torch.zeros_like(x).index_add_(0, into, x * weight[:, None])[roots]
                into[rest] = self.merged(F.normalize(mean, dim=1), roots, roots // per_pair, trees, into)[rest]
        return into.view_as(index), weight.view_as(index)

    def linked(self, unit: torch.Tensor, rest: torch.Tensor, grid: torch.Tensor, most: int) -> torch.Tensor:
        """int64 `[r]`: the root of the tree of each of the tokens `rest` (of `unit`, `[n, D]`) with at most `most` links."""
        parent, like = rest.clone(), torch.full((len(rest),), -torch.inf, device=unit.device)
        last = int(grid[-1])
        for g in range(1, last + 1):
            before, now = rest[grid == g - 1], grid == g
            if len(before) and now.any():
                like[now], to = closest(unit[rest[now]], unit[before])
                parent[now] = before[to]
        strongest = ranked(like)[:most]
        links = torch.zeros(len(rest), dtype=torch.bool, device=unit.device)
        links[strongest] = like[strongest] > self.link
        root = torch.arange(len(unit), device=unit.device)
        for g in range(1, last + 1):  # what a link leads to has found its root by then
            now = links & (grid == g)
            root[rest[now]] = root[parent[now]]
        return root[rest]

    def merged(
        self, unit: torch.Tensor, roots: torch.Tensor, grid: torch.Tensor, keep: int, into: torch.Tensor
    ) -> torch.Tensor:
        """int64 like `into`, where each token goes once the trees of `roots`, means `unit` (`[r, D]`), are merged to `keep`."""
        sizes = torch.bincount(grid).tolist()
        to = torch.full_like(into, -1)
        start = 0
        for size, count in zip(sizes, apportion(keep, sizes, sizes), strict=True):
            if count:
                some = unit[start : start + size]
                centres = peaks(some, count, self.neighbours)
                local = centres[nearest(some, some[centres])].index_copy(0, centres, centres)
                to[roots[start : start + size]] = roots[start + local]
            start += size
        return to[into]
