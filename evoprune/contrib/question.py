"""Selectors that read the question: CDPruner, PAR, DART."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.contrib.common import turns
from evoprune.methods.base import Selector
from evoprune.methods.plans import spread
from evoprune.methods.ranking import highest, of_pairs, ranked, scaled, snap
from evoprune.methods.settings import Cosine
from evoprune.methods.types import Selection, Tokens, arange_on

MIN_RELEVANCE = 1 / 128
STEP = 1 / 16384
MAX_FEATURES = 1 << 23  # features in float64 that are held at a time


@dataclass(frozen=True)
class CdPruner(Selector):
    """Tokens that span a great volume together, each weighted by its relevance."""

    name = "cdpruner"
    source = "arXiv 2506.10967"

    question: bool = True  # whether relevance counts; otherwise diversity alone decides
    negative: bool = False  # whether tokens unlike the question are relevant, as in the authors' code

    @property
    def reads_question(self) -> bool:
        return self.question

    def scores(self, tokens: Tokens) -> torch.Tensor:
        if not self.question:
            return torch.ones(len(tokens.unit_to_row), dtype=torch.float32, device=tokens.rows.device)
        return -like_question(tokens) if self.negative else like_question(tokens)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        weight = torch.stack([*map(relevant, tokens.by_pair(self.scores(tokens)))])
        unit = tokens.by_pair(tokens.normalised)
        counts = spread(keep, len(unit))
        at_once = max(1, MAX_FEATURES // unit[0].numel())
        kept = []
        for first in range(0, len(unit), at_once):
            part = slice(first, first + at_once)
            kept += widest(unit[part], weight[part], counts[part])
        return of_pairs(kept, unit.shape[1])


def like_question(tokens: Tokens) -> torch.Tensor:
    """Return float32 `[N]`: the mean cosine of each token to the tokens of the question, rounded so that equal tokens are ties."""
    return snap((tokens.normalised @ F.normalize(tokens.question, dim=1).T).mean(1))


def relevant(relevance: torch.Tensor) -> torch.Tensor:
    """Relevance `[n]` scaled to (0, 1]."""
    flat = relevance.max() == relevance.min()
    return torch.where(flat, torch.ones_like(relevance), scaled(relevance).clamp(min=MIN_RELEVANCE))


def widest(unit: torch.Tensor, weight: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """Return for each of T groups int64 `[count]`, ascending: the rows of greatest weighted volume, found greedily.

    `unit`: `[T, n, D]`; `weight`: `[T, n]`; `counts`: how many of each group. All groups select a row at a time.
    """
    vectors = unit.double() * weight.double()[:, :, None]
    factor = vectors.new_zeros(max(counts), *weight.shape)  # rows of the Cholesky factors, in the order of selection
    left = vectors.square().sum(2)  # squared length of each row outside the span of the selected ones
    selected = torch.zeros_like(left, dtype=torch.bool)
    order = []
    for step in range(max(counts)):
        best = snap(left).masked_fill(selected, -torch.inf).argmax(1, keepdim=True)
        selected.scatter_(1, best, True)
        order.append(best)
        column = vectors.take_along_dim(best[:, :, None], 1).transpose(1, 2)
        known = factor[:step].take_along_dim(best[None], 2)  # of each selected row, its part along those before
        beside = (vectors @ column)[:, :, 0] - (factor[:step] * known).sum(0)
        factor[step] = beside / left.take_along_dim(best, 1).clamp(min=STEP).sqrt()
        left = left - factor[step].square()
    order = torch.cat(order, 1)
    return [rows[:count].sort().values for rows, count in zip(order, counts, strict=True)]


@dataclass(frozen=True)
class Par(Selector):
    """Tokens by relevance, which counts less for each more relevant token of the same cluster."""

    name = "par"
    source = "after arXiv 2410.07278"
    reads_question = True

    link: Cosine = 0.8  # neighbouring tokens are of one cluster if their cosine is above this

    def scores(self, tokens: Tokens) -> torch.Tensor:
        relevance = snap(relevant(like_question(tokens)))
        cluster = connected(tokens.normalised.view(*tokens.grid, -1), self.link)
        return relevance / (1 + turns(ranked(relevance), cluster))

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(highest(self.scores(tokens), keep))


def connected(unit: torch.Tensor, link: float) -> torch.Tensor:
    """Return int64 `[N]`: the first token of each token's cluster. Neighbours in `unit` (`[T, H, W, D]`) with a cosine above `link`
    are in one.
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
        for end in (cluster[a], cluster[b]):  # the roots, so that whole clusters join
            cluster.scatter_reduce_(0, end, lowest, "amin")
        while (cluster != cluster[cluster]).any():
            cluster = cluster[cluster]
    return cluster


@dataclass(frozen=True)
class Dart(Selector):
    name = "dart"
    source = "arXiv 2502.11494"

    visual: Annotated[int, "[0, inf)"] = 4  # number of visual pivots
    text: Annotated[int, "[0, inf)"] = 4  # number of pivots of the question; with 0 the method does not read it

    def __post_init__(self):
        super().__post_init__()
        if not self.visual + self.text:
            raise ValueError("visual and text are both 0, and one of them must be more")

    @property
    def reads_question(self) -> bool:
        return self.text > 0

    def select(self, tokens: Tokens, keep: int) -> Selection:
        unit = tokens.normalised
        first = longest(tokens.features.float(), min(self.visual, keep))
        pivots = unit[first]
        if self.text:
            pivots = torch.cat([pivots, F.normalize(tokens.question[longest(tokens.question, self.text)], dim=1)])
        unlike = -snap(unit @ pivots.T)
        unlike[first] = -torch.inf
        per_pivot, odd = divmod(keep - len(first), len(pivots))
        selected = [first]
        for pivot in range(len(pivots)):
            selected.append(ranked(unlike[:, pivot])[: per_pivot + (pivot < odd)])
            unlike[selected[-1]] = -torch.inf
        return Selection(torch.cat(selected).sort().values)


def longest(x: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 `[min(count, n)]`: the rows of `x` (`[n, D]`) of greatest L1 norm, the greatest first; ties by index."""
    norm = x.abs().sum(1)
    return ranked(snap(norm / norm.max().clamp(min=1e-12)))[:count]
