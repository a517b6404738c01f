"""The `par` method, based on PAR, which keeps tokens relevant to the question and discounts tokens in the same cluster."""

from dataclasses import dataclass

import torch

from evoprune.contrib.shared import Cosine, like_question, ranked, relevant, turns
from evoprune.methods import Selection, Selector, Tokens, arange_on, highest, snap


@dataclass(frozen=True)
class Par(Selector):
    """Keeps relevant tokens, discounted by the number of more relevant tokens in their cluster. Based on PAR (arXiv 2410.07278).

    Neighboring tokens in space or time belong to the same cluster if their cosine similarity is above `link`. The score of the j-th
    most relevant token in a cluster is its relevance divided by j, and the highest-scoring tokens are kept. Relevance is the mean
    cosine similarity to the question tokens, scaled to (0, 1].

    Differences from the paper: neither its formulas nor its code were available. This project uses its own formulas, so the results
    say little about PAR itself.
    """

    name = "par"
    source = "after arXiv 2410.07278"
    reads_question = True

    link: Cosine = 0.8  # neighboring tokens belong to the same cluster if their cosine similarity is above this

    def scores(self, tokens: Tokens) -> torch.Tensor:
        relevance = snap(relevant(like_question(tokens)))
        cluster = connected(tokens.normalised.view(*tokens.grid, -1), self.link)
        return relevance / (1 + turns(ranked(relevance), cluster))

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(highest(self.scores(tokens), keep))


def connected(unit: torch.Tensor, link: float) -> torch.Tensor:
    """Find clusters of connected tokens, where neighbors are connected if their cosine similarity is above `link`.

    Args:
        unit: `[T, H, W, D]`, unit-length tokens.
        link: The similarity threshold for connecting neighbors.

    Returns:
        int64 `[N]`, the index of the first token in each token's cluster.
    """
    index = arange_on(unit[..., 0].numel(), unit.device).view(unit.shape[:3])
    ends = []
    for dim in range(3):
        length = unit.shape[dim] - 1
        linked = (snap((unit.narrow(dim, 0, length) * unit.narrow(dim, 1, length)).sum(-1)) > link).flatten()
        ends.append(torch.stack([index.narrow(dim, first, length).flatten()[linked] for first in (0, 1)]))
    a, b = torch.cat(ends, 1)
    cluster = index.flatten().clone()
    while (cluster[a] != cluster[b]).any():
        lowest = torch.minimum(cluster[a], cluster[b])
        for end in (cluster[a], cluster[b]):  # update the roots, so that whole clusters merge
            cluster.scatter_reduce_(0, end, lowest, "amin")
        while (cluster != cluster[cluster]).any():
            cluster = cluster[cluster]
    return cluster
