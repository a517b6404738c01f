"""FastV (arXiv 2403.06764), and other methods that keep the tokens of highest score inside the language model."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.methods.base import LanguageMethod
from evoprune.methods.plans import LanguagePlan, apportion, one_drop, several_drops
from evoprune.methods.ranking import closest, highest, ranked, relative, snap, turns
from evoprune.methods.settings import Part, Share
from evoprune.methods.types import LayerTokens, Selection, ascending

LAST = 3  # tokens of the prompt whose attention counts in `nuwa-inner`
LEAST = 2.0**-126  # of a weight; float32 has no smaller number of full precision


@dataclass(frozen=True)
class HighestScore(LanguageMethod):
    """Of the tokens that are there, those of the highest score stay."""

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """float32 `[n]`, at least 0: what the tokens that stay have most of; here attention of the last token."""
        return tokens.attention()

    def select(self, tokens: LayerTokens) -> Selection:
        return Selection(highest(relative(self.score(tokens)), tokens.left))


@dataclass(frozen=True)
class FastV(HighestScore):
    name = "fastv"
    source = "arXiv 2403.06764, section 4"

    depth: Part = 2 / 32  # share of the layers that run before tokens leave

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)


@dataclass(frozen=True)
class PyramidDrop(HighestScore):
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
        return tokens.last_weights(LAST)[:, tokens.visual].amax(0)


@dataclass(frozen=True)
class PruneVidInner(FastV):
    name = "prunevid-inner"
    source = "arXiv 2412.16117, section 3.3"
    default_share = 0.4

    depth: Part = 11 / 32

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        queries = ascending(len(tokens.queries), tokens.visual.device)
        return tokens.unrotated().attention(queries, most=True, causal=False)

    def select(self, tokens: LayerTokens) -> Selection:
        index, score = ascending(len(tokens.pair), tokens.pair.device), relative(self.score(tokens))
        sizes = tokens.pair.unique_consecutive(return_counts=True)[1].tolist()
        counts = apportion(tokens.left, sizes, sizes)
        kept = [some[highest(score[some], count)] for some, count in zip(index.split(sizes), counts, strict=True)]
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
        rest, chosen = order[pivots:], []
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
    """The selection of `kept` (int64 `[K]`, ascending) rows of `unit` (`[n, D]`, of length 1), which the others join in turn.

    A token becomes the mean of itself and the next one that joins. So the last to join weighs a half, the one before a quarter.
    """
    count, device = len(unit), unit.device
    others = torch.ones(count, dtype=torch.bool, device=device).index_fill_(0, kept, False).nonzero()[:, 0]
    owner = torch.zeros(count, dtype=torch.int64, device=device)
    to = closest(unit[others], unit[kept])[1]
    owner[kept], owner[others] = ascending(len(kept), device), to
    joining = torch.bincount(to, minlength=len(kept))
    later = torch.empty(count, dtype=torch.float32, device=device)  # how many join after a token does, itself included
    later[kept], later[others] = joining.float(), (joining[to] - turns(ascending(len(to), device), to)).float()
    return Selection(kept, owner, torch.exp2(-later).clamp(min=LEAST))
