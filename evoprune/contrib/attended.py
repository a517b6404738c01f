"""Selectors that read the attention which tokens receive: VisionZip, VisPruner, Nuwa, MMR, SCOPE."""

from dataclasses import dataclass
from math import hypot
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.backend.operators import greedy_cosine
from evoprune.contrib.common import centre_weights, gathered
from evoprune.methods.base import Selector
from evoprune.methods.plans import spread
from evoprune.methods.ranking import BLOCK, closest, highest, of_pairs, ranked, scaled, snap
from evoprune.methods.settings import Count, Share
from evoprune.methods.types import Selection, Tokens, arange_on


@dataclass(frozen=True)
class VisionZip(Selector):
    """Keep the most attended tokens as they are, and means of the other tokens."""

    name = "visionzip"
    source = "arXiv 2412.04467"
    needs = frozenset({"attention", "keys"})

    dominant: Share = 0.85  # share of the kept tokens that attention selects

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        attention = snap(tokens.attention)
        keys = F.normalize(tokens.keys, dim=1)
        into = torch.full_like(tokens.unit_to_row, -1)
        index = tokens.by_pair(arange_on(len(into), into.device))
        for here, share in zip(index, spread(keep, len(index)), strict=True):
            best = here[highest(attention[here], round(self.dominant * share))]
            into[best] = best
            rest = here[into[here] < 0]
            count = share - len(best)
            if count:  # otherwise the other tokens are dropped
                targets = rest[:: len(rest) // count][:count]
                into[rest] = targets[closest(keys[rest], keys[targets])[1]]
                into[targets] = targets
        return gathered(into, centre_weights(into, 0.5))


@dataclass(frozen=True)
class VisPruner(Selector):
    """Half of the tokens by attention, the other half because they differ from each other."""

    name = "vispruner"
    source = "arXiv 2412.01818"
    needs = frozenset({"attention"})

    important: Share = 0.5  # share of the kept tokens that attention selects
    step: Count = 8  # the most tokens that one round removes

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        attention = tokens.by_pair(snap(tokens.attention))
        unit = tokens.by_pair(tokens.normalised)
        return of_pairs(map(self.kept, attention, unit, spread(keep, len(unit))), unit.shape[1])

    def kept(self, attention: torch.Tensor, unit: torch.Tensor, keep: int) -> torch.Tensor:
        """Return int64 `[keep]`, ascending: what a frame pair keeps, by `attention` (`[n]`) and `unit` (`[n, D]`)."""
        order = ranked(attention)
        first = int(self.important * keep)
        rest = order[first:]
        distinct = rest[most_distinct(unit[rest], keep - first, self.step)]
        return torch.cat([order[:first], distinct]).sort().values


def most_distinct(unit: torch.Tensor, keep: int, step: int) -> torch.Tensor:
    """Return int64 `[keep]`: the rows of `unit` (`[n, D]`, the most attended first) left when rounds remove up to `step` similar
    ones.
    """
    if keep == 0:
        return arange_on(0, unit.device)
    left = arange_on(len(unit), unit.device)
    while len(left) > keep:
        even = left[::2]
        odd = left[1::2]
        like = torch.cat([snap(unit[block] @ unit[odd].T).amax(1) for block in even.split(BLOCK)])
        # Of equals the last goes: a stable sort of the reversed rows puts it first.
        order = len(even) - 1 - like.flip(0).argsort(descending=True, stable=True)
        left = torch.cat([even[order[min(step, len(left) - keep) :]], odd])
    return left


@dataclass(frozen=True)
class Nuwa(Selector):
    name = "nuwa"
    source = "arXiv 2602.02951, the stage before the language model"
    needs = frozenset({"attention", "middle"})

    cell: Annotated[int, "[1, 4]"] = 3  # tokens of each cell of 2x2 places that are candidates
    weak: Share = 0.1  # quantile of the kept tokens' attention below which a token becomes a mean
    reach: Annotated[float, "(0, inf]"] = 0.8  # distance at which a weight is 0, as a share of the diagonal

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return snap(tokens.attention)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        score = self.scores(tokens).view(tokens.grid)
        middle = tokens.by_pair(tokens.middle)
        late = (rank_in_cell(score).flatten(1) - self.cell + 1).clamp(min=0)
        kept = []
        means = []
        start = 0
        for pair, share in enumerate(spread(keep, len(score))):
            order = ranked(score[pair].flatten())
            here = order[late[pair][order].argsort(stable=True)][:share].sort().values
            if share:
                token, place, weight = self.means(score[pair], here, middle[pair])
                means.append((token + start, place + pair * len(order), weight))
            kept.append(here)
            start += share
        return Selection(of_pairs(kept, len(order)).kept, means=tuple(map(torch.cat, zip(*means, strict=True))))

    def means(
        self, score: torch.Tensor, kept: torch.Tensor, middle: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what each kept token of a frame pair is the mean of: int64 `[m]`, tokens; int64 `[m]`, places; float32 `[m]`,
        weights.

        `score`: `[H, W]`, attention. `kept`: int64 `[k]`, places. `middle`: `[H W, d]`, states in the middle of the tower.
        """
        height, width = score.shape
        attention = score.flatten()[kept]
        own = arange_on(len(kept), kept.device)
        weak = own[attention < attention.quantile(self.weak)]
        unit = F.normalize(middle.float(), dim=1)
        places = arange_on(height * width, kept.device)
        at = torch.stack([places // width, places % width], 1).float()
        near = 1 - torch.cdist(at[kept[weak]], at) / (self.reach * (hypot(height - 1, width - 1) or 1))
        weight = (unit[kept[weak]] @ unit.T).clamp(min=0) * near.clamp(min=0)
        weight[arange_on(len(weak), kept.device), kept[weak]] = 0  # its own weight is exactly 1, below
        token, place = weight.nonzero().unbind(1)
        weight = torch.cat([torch.ones_like(attention), weight[token, place]])
        return torch.cat([own, weak[token]]), torch.cat([kept, place]), weight


def rank_in_cell(score: torch.Tensor) -> torch.Tensor:
    """Return int64 `[T, H, W]`: how many places of its cell come before each place by `score` (`[T, H, W]`); ties by index."""
    height, width = score.shape[1:]
    even = F.pad(score, (0, width % 2, 0, height % 2), value=-torch.inf)
    cells = even.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3)
    rank = cells.argsort(dim=3, descending=True, stable=True).argsort(dim=3)
    return rank.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


@dataclass(frozen=True)
class Mmr(Selector):
    name = "mmr"
    source = "after arXiv 2602.13315, without its trained scorer"

    importance: str = "attention"  # `attention` received, or `keynorm` for the norm of a unit's key
    lam: Share = 0.5  # weight of importance; diversity has the weight 1 - lam

    def __post_init__(self):
        super().__post_init__()
        if self.importance not in ("attention", "keynorm"):
            raise ValueError(f"importance is one of attention, keynorm, not {self.importance!r}")

    @property
    def needs(self) -> frozenset[str]:
        if self.importance == "attention":
            return frozenset({"attention"})
        return frozenset({"keys"})

    def scores(self, tokens: Tokens) -> torch.Tensor:
        if self.importance == "attention":
            return tokens.attention
        return tokens.keys.norm(dim=1)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(most_relevant(tokens.features, self.scores(tokens), keep, self.lam))


def most_relevant(features: torch.Tensor, importance: torch.Tensor, keep: int, lam: float = 0.5) -> torch.Tensor:
    """Return int64 `[keep]`, ascending: rows of `features` (`[N, D]`) by maximal marginal relevance; `lam` weighs `importance`
    (`[N]`).
    """
    important = lam * snap(scaled(importance.float()))
    return greedy_cosine(F.normalize(features.float(), dim=1), None, important, 1 - lam, keep, False)


@dataclass(frozen=True)
class Scope(Selector):
    name = "scope"
    source = "arXiv 2510.24214"

    alpha: Annotated[float, "[0, inf)"] = 1.0  # power of saliency; at 0, coverage alone decides

    @property
    def needs(self) -> frozenset[str]:
        if self.alpha == 0:
            return frozenset()
        return frozenset({"attention"})

    def select(self, tokens: Tokens, keep: int) -> Selection:
        # What a row adds only shrinks while others are selected. So earlier sums are upper bounds, and only the highest are
        # computed again.
        unit = tokens.normalised
        every = arange_on(len(unit), unit.device)
        cover = torch.zeros_like(unit[:, 0])
        weight = torch.ones_like(every).double()
        if self.alpha:
            weight = snap(tokens.attention).double() ** self.alpha

        def cosine(rows: torch.Tensor) -> torch.Tensor:
            return (unit[rows] @ unit.T).mul_(16384).round_()  # in steps, as of `ranking.snap`

        def adds(rows: torch.Tensor) -> torch.Tensor:
            return cosine(rows).sub_(cover).clamp_(min=0).sum(1, dtype=torch.float64) * weight[rows]

        bounds = torch.cat([adds(rows) for rows in every.split(BLOCK)])  # what each adds at most; -1 once selected
        for _ in range(keep):
            known = bounds <= 0
            while not known[best := bounds.argmax()]:
                stale = torch.where(known, -torch.inf, bounds).topk(min(32, len(unit))).indices
                stale = stale[~known[stale]]
                bounds[stale] = adds(stale)
                known[stale] = True
            bounds[best] = -1
            cover = torch.maximum(cover, cosine(best[None])[0])
        return Selection((bounds < 0).nonzero().flatten())
