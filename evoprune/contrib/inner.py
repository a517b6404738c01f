"""FastV and other methods inside the language model: after some layers visual tokens leave."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.contrib.common import gathered, joined_peaks, relative, turns, vicinity_clusters
from evoprune.contrib.language import (
    Drop,
    DroppingMethod,
    LanguagePlan,
    LayerTokens,
    layers_before,
    one_drop,
    several_drops,
)
from evoprune.methods.budget import keep_count
from evoprune.methods.plans import apportion
from evoprune.methods.ranking import BLOCK, closest, highest, ranked, snap
from evoprune.methods.settings import Part, Share
from evoprune.methods.types import Selection, arange_on


@dataclass(frozen=True)
class FastV(DroppingMethod):
    name = "fastv"
    source = "arXiv 2403.06764, section 4"

    depth: Part = 2 / 32  # share of the layers that run before tokens leave

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)


@dataclass(frozen=True)
class PyramidDrop(DroppingMethod):
    """After a quarter, a half and three quarters of the layers a share of the visual tokens stays."""

    name = "pyramiddrop"
    source = "arXiv 2410.17247, section 3.2"
    default_share = 7 / 24  # (1/2 + 1/4 + 1/8) / 3: half of the tokens leave each time

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return several_drops(depth, tokens, (0.25, 0.5, 0.75), lambda share: (share, share**2, share**3), budget)

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        return tokens.following().attention()


@dataclass(frozen=True)
class FlashVidInner(FastV):
    name = "flashvid-inner"
    source = "arXiv 2602.08024"
    default_share = 0.3

    depth: Part = 20 / 28


@dataclass(frozen=True)
class NuwaInner(FastV):
    name = "nuwa-inner"
    source = "arXiv 2602.02951"
    default_share = 0.42

    depth: Part = 15 / 28

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        return tokens.last_weights(3)[:, tokens.visual].amax(0)


@dataclass(frozen=True)
class PruneVidInner(FastV):
    name = "prunevid-inner"
    source = "arXiv 2412.16117, section 3.3"
    default_share = 0.4

    depth: Part = 11 / 32

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        queries = arange_on(len(tokens.queries), tokens.visual.device)
        return tokens.unrotated().attention(queries, most=True, causal=False)

    def select(self, tokens: LayerTokens) -> Selection:
        index = arange_on(len(tokens.pair), tokens.pair.device)
        score = relative(self.score(tokens))
        sizes = tokens.pair.unique_consecutive(return_counts=True)[1].tolist()
        counts = apportion(tokens.left, sizes, sizes)
        kept = [pair[highest(score[pair], count)] for pair, count in zip(index.split(sizes), counts, strict=True)]
        return Selection(torch.cat(kept))


@dataclass(frozen=True)
class HoliTomInner(FastV):
    name = "holitom-inner"
    source = "arXiv 2505.21334"
    default_share = 0.5

    depth: Part = 18 / 28

    def select(self, tokens: LayerTokens) -> Selection:
        return joined_in_turn(F.normalize(tokens.hidden.float(), dim=1), super().select(tokens).kept)


@dataclass(frozen=True)
class D2Pruner(FastV):
    """After D2Pruner: attention without the bias of position, then tokens that are unlike each other."""

    name = "d2pruner"
    source = "after arXiv 2512.19443"

    pivots: Share = 0.7  # share of the budget that goes by score alone
    alike: Annotated[float, "(-inf, inf)"] = 0.8  # above this cosine, two of the other tokens do not both stay

    def select(self, tokens: LayerTokens) -> Selection:
        order = ranked(relative(tokens.attention() / (tokens.evened().attention() + 1e-7)))
        pivots = int(tokens.left * self.pivots)
        rest = order[pivots:]
        chosen = []
        unit = F.normalize(tokens.hidden[rest].float(), dim=1)
        free = torch.ones_like(rest, dtype=torch.bool)
        while len(chosen) < tokens.left - pivots and free.any():
            best = int(free.nonzero()[0])
            chosen.append(best)
            free &= snap(unit @ unit[best]) <= self.alike
            free[best] = False
        late = torch.ones_like(rest).index_fill_(0, rest.new_tensor(chosen), 0)
        filled = rest[late.argsort(stable=True)]  # the unlike ones, then the others, each by score
        return Selection(torch.cat([order[:pivots], filled[: tokens.left - pivots]]).sort().values)


def joined_in_turn(unit: torch.Tensor, kept: torch.Tensor) -> Selection:
    """Return the selection of `kept` (int64 `[K]`, ascending) rows of `unit` (`[n, D]`, of length 1), which the others join in
    turn.

    A token becomes the mean of itself and the next one that joins. So the last to join weighs a half, the one before a quarter.
    """
    count = len(unit)
    device = unit.device
    others = torch.ones(count, dtype=torch.bool, device=device).index_fill_(0, kept, False).nonzero()[:, 0]
    unit_to_token = torch.zeros(count, dtype=torch.int64, device=device)
    to = closest(unit[others], unit[kept])[1]
    unit_to_token[kept], unit_to_token[others] = arange_on(len(kept), device), to
    joining = torch.bincount(to, minlength=len(kept))
    later = torch.empty(count, dtype=torch.float32, device=device)  # how many join after a token does, itself included
    later[kept], later[others] = joining.float(), (joining[to] - turns(arange_on(len(to), device), to)).float()
    # float32 has no smaller number of full precision
    return Selection(kept, unit_to_token, torch.exp2(-later).clamp(min=2.0**-126))


# Tokens left after each drop, of 576, from none to all; between them, the authors' for 64, 96, 128 and 192 tokens on average.
COUNTS = ((0, 0, 0), (66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110), (576, 576, 576))


@dataclass(frozen=True)
class SparseVlm(DroppingMethod):
    name = "sparsevlm"
    source = "arXiv 2410.04417, section 3"
    default_share = (4 * 300 + 9 * 200 + 16 * 110) / (29 * 576)  # the authors' 192 tokens

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        def shares(place: float) -> Sequence[float]:
            row = min(int(place * (len(COUNTS) - 1)), len(COUNTS) - 2)
            part = place * (len(COUNTS) - 1) - row
            return [(low + part * (high - low)) / 576 for low, high in zip(*COUNTS[row : row + 2], strict=True)]

        return several_drops(depth, tokens, (3 / 32, 7 / 32, 16 / 32), shares, budget)

    def select(self, tokens: LayerTokens) -> Selection:
        if "raters" not in tokens.memory:
            tokens.memory["raters"] = _raters(tokens.visual_embeds, tokens.text_embeds)
        score = relative(tokens.attention(tokens.memory["raters"]))
        count = len(tokens.visual)
        stay = selected(count, tokens.left)
        order = ranked(score)
        into = torch.full_like(order, -1)
        into[order[:stay]] = order[:stay]
        if means := tokens.left - stay:
            merging = order[stay : stay + recycled(count - stay)].sort().values
            into[merging] = merging[joined_peaks(tokens.hidden[merging], means, means)]
        return gathered(into)


def _raters(visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """int64 `[q]`: the text tokens (`[Q, D]`) that rate the visual tokens (`[N, D]`)."""
    words = text.float().T
    weight = sum((block.float() @ words).softmax(1).sum(0) for block in visual.split(BLOCK))
    raters = (weight > weight.mean()).nonzero()[:, 0]
    return raters if len(raters) else arange_on(len(text), text.device)


def recycled(dropped: int) -> int:
    """Return how many of the dropped tokens merge."""
    return int(dropped * 0.3) + 1


def selected(count: int, left: int) -> int:
    """Return how many of `count` tokens stay as they are, so that with the means of the others `left` remain; all, if there is
    no room.
    """
    for stay in range(left - 1, 0, -1):
        if stay + recycled(count - stay) // 10 + 1 <= left:
            return stay
    return left


@dataclass(frozen=True)
class VisiPruner(DroppingMethod):
    name = "visipruner"
    source = "arXiv 2510.17205, section 4"
    exact = False

    shallow: Part = 6 / 32  # share of the layers in which text does not attend to visual tokens
    latest: Part = 0.5  # share of the layers after which tokens leave if no layer was decisive
    layer: Part = 0.995  # cosine below which a layer is decisive
    token: Annotated[float, "[0, inf]"] = 0.2  # least |c_i| of tokens that stay
    exit: Part = 0.999  # no token may be below this cosine
    exits: Annotated[int, "[0, inf]"] = 2  # in so many layers, for all to leave; 0 for never

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        keep = keep_count(budget, tokens)
        blind = layers_before(self.shallow, depth)
        if keep == tokens or depth < 2:
            return LanguagePlan(depth, tokens, ())
        first = min(blind + 2, depth - 1)
        latest = max(first, layers_before(self.latest, depth))
        looks = tuple(range(first, depth))
        return LanguagePlan(depth, tokens, (Drop(latest, keep),), exact=False, looks=looks, blind=blind)

    def select(self, tokens: LayerTokens) -> Selection | None:
        if not len(tokens.visual):
            return None
        cosine, length = contributions(tokens)
        if "exits" in tokens.memory:
            tokens.memory["exits"] += bool((cosine >= self.exit).all())
            leaving = 0 < self.exits == tokens.memory["exits"]
            return Selection(arange_on(0, length.device)) if leaving else None
        decisive = bool((cosine < self.layer).any())
        if not (decisive or tokens.due):
            return None
        tokens.memory["exits"] = 0
        keep = max(1, min(tokens.left, int((length > self.token).sum()))) if decisive else tokens.left
        return Selection(highest(relative(length), keep))


def contributions(tokens: LayerTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 `[n]` each: cos(o - c_i, o) and |c_i| of every visual token, without the c_i themselves: O(n heads head_dim)."""
    weights = tokens.last_weights().double()
    kv_heads = tokens.values.shape[1]
    weights = weights.view(kv_heads, -1, weights.shape[1])  # [kv_heads, group, C]
    out = weights @ tokens.values.transpose(0, 1).double()  # [kv_heads, group, head_dim]
    given = weights[:, :, tokens.visual]
    values = tokens.values[tokens.visual].transpose(0, 1).double()
    along = (given * (out @ values.transpose(1, 2))).sum((0, 1))  # c_i . o
    square = (given.square() * values.square().sum(2)[:, None]).sum((0, 1))  # |c_i|^2
    total = out.square().sum()
    rest = (total - 2 * along + square).clamp(min=0).sqrt()  # |o - c_i|
    return (total - along) / (total.sqrt() * rest).clamp(min=1e-30), square.sqrt()


@dataclass(frozen=True)
class ViTCoP(DroppingMethod):
    """O(n^2 D) for the n tokens of a frame pair, at the first drop."""

    name = "vitcop"
    source = "arXiv 2601.17818"
    default_share = (32 * 2 / 9 / 0.4 - 2) / 30  # 2/9 over all layers, behind a stage that keeps 0.4

    centres: Share = 0.15  # number of clusters, as a share of a frame pair's tokens
    cutoff: Annotated[float, "(0, inf)"] = 0.25  # of distances, as a share of their root mean square
    near: Annotated[float, "[0, inf)"] = 0.6  # how far apart joining tokens may be, in heights and widths of the frame

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        places = 2 / 32, 22 / 32
        return several_drops(depth, tokens, places, lambda s: (s, max(s / 5, 1 - 8.2 * (1 - s))), budget)

    def select(self, tokens: LayerTokens) -> Selection:
        length = tokens.keys[tokens.visual].double().mean(1).norm(dim=1)
        if len(tokens.visual) < len(tokens.visual_embeds):
            return Selection(highest(-relative(length), tokens.left))
        into = []
        index = arange_on(len(tokens.visual), tokens.visual.device)
        for pair in index.split(tokens.pair.unique_consecutive(return_counts=True)[1].tolist()):
            count = max(1, int(self.centres * len(pair)))
            x = tokens.visual_embeds[pair]
            into.append(pair[vicinity_clusters(x, tokens.place[pair], count, self.cutoff, self.near)])
        return merged(torch.cat(into).unique(return_inverse=True)[1], length, tokens.left)


def merged(cluster: torch.Tensor, length: torch.Tensor, left: int) -> Selection:
    """Of each cluster the tokens with the shortest keys stay; its others become one token, at the place of the middle one.

    `cluster`: int64 `[n]`; if there are more than `left`, those of long keys become one. `length`: float64 `[n]`, of each key.
    """
    index = arange_on(len(cluster), cluster.device)
    size = torch.bincount(cluster)
    total = torch.zeros(len(size), dtype=torch.float64, device=cluster.device).index_add_(0, cluster, length)
    order = ranked(-relative(total))
    spare = left - len(size)
    alone = torch.zeros_like(size)
    if spare < 0:
        cluster = order.argsort().clamp(max=left - 1)[cluster]
        alone = alone[:left]
        size = torch.bincount(cluster)
    elif spare > 0:
        alone = ((size - 1).double() / (size - 1).sum() * spare).round().long()
        missing = spare - int(alone.sum())
        able = order[alone[order] < size[order] - 1] if missing > 0 else order[alone[order] > 0].flip(0)
        alone[able[: abs(missing)]] += 1 if missing > 0 else -1
    stays = turns(ranked(-relative(length)), cluster) < alone[cluster]
    joining = (size - alone)[cluster]
    middle = turns(stays.to(torch.int8).argsort(stable=True), cluster) == joining // 2
    to = torch.empty_like(size).index_copy_(0, cluster[middle], index[middle])
    return gathered(torch.where(stays, index, to[cluster]), torch.where(middle, joining + 1, 1).float())
