"""After PAR (arXiv 2410.07278): tokens that the question is about, and few of those that repeat each other."""

from dataclasses import dataclass

import torch

from evoprune.methods.base import Selector
from evoprune.methods.cdpruner import like_question, relevant
from evoprune.methods.settings import Cosine
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import highest, ranked, snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Par(Selector):
    name = "par"
    source = "after arXiv 2410.07278"
    reads_question = True

    link: Cosine = 0.8  # neighbouring tokens are of one cluster if their cosine is above this

    def scores(self, tokens: Tokens) -> torch.Tensor:
        relevance = snap(relevant(like_question(tokens)))
        return relevance / (1 + rank_inside(relevance, connected(tokens.normalised.view(*tokens.grid, -1), self.link)))

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(highest(self.scores(tokens), keep))


def connected(unit: torch.Tensor, link: float) -> torch.Tensor:
    """int64 `[N]`: the first token of each one's cluster: neighbours of `unit` (`[T, H, W, D]`) whose cosine is above `link`."""
    index = ascending(unit[..., 0].numel(), unit.device).view(unit.shape[:3])
    ends = []
    for dim in range(3):
        length = unit.shape[dim] - 1
        linked = (snap((unit.narrow(dim, 0, length) * unit.narrow(dim, 1, length)).sum(-1)) > link).flatten()
        ends.append(torch.stack([index.narrow(dim, first, length).flatten()[linked] for first in (0, 1)]))
    a, b = torch.cat(ends, 1)
    cluster = index.flatten().clone()
    while (cluster[a] != cluster[b]).any():
        least = torch.minimum(cluster[a], cluster[b])
        for end in (cluster[a], cluster[b]):  # the roots, so that whole clusters join
            cluster.scatter_reduce_(0, end, least, "amin")
        while (cluster != cluster[cluster]).any():
            cluster = cluster[cluster]
    return cluster


def rank_inside(score: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """int64 `[N]`: how many tokens of the same group come before each token by score; ties by index."""
    order = ranked(score)
    order = order[group[order].argsort(stable=True)]  # by group, then by score
    place = ascending(len(order), order.device)
    new = torch.cat([group.new_ones(1, dtype=torch.bool), group[order][1:] != group[order][:-1]])
    start = torch.where(new, place, 0).cummax(0).values
    return torch.empty_like(order).index_copy_(0, order, place - start)
