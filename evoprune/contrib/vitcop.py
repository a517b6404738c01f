"""ViTCoP's stages inside the language model (arXiv 2601.17818): short keys stay, others merge. Before: `visionzip:dominant=1`."""

from dataclasses import dataclass
from typing import Annotated

import torch

from evoprune.contrib.density import vicinity_clusters
from evoprune.methods.base import LanguageMethod
from evoprune.methods.plans import LanguagePlan, several_drops
from evoprune.methods.ranking import gathered, highest, ranked, relative, turns
from evoprune.methods.settings import Share
from evoprune.methods.types import LayerTokens, Selection, ascending

PLACES = (2 / 32, 22 / 32)


@dataclass(frozen=True)
class ViTCoP(LanguageMethod):
    """O(n^2 D) for the n tokens of a frame pair, at the first drop."""

    name = "vitcop"
    source = "arXiv 2601.17818"
    default_share = (32 * 2 / 9 / 0.4 - 2) / 30  # 2/9 over all layers, behind a stage that keeps 0.4

    centres: Share = 0.15  # number of clusters, as a share of a frame pair's tokens
    cutoff: Annotated[float, "(0, inf)"] = 0.25  # of distances, as a share of their root mean square
    near: Annotated[float, "[0, inf)"] = 0.6  # how far apart joining tokens may be, in heights and widths of the frame

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return several_drops(depth, tokens, PLACES, lambda part: (part, max(part / 5, 1 - 8.2 * (1 - part))), budget)

    def select(self, tokens: LayerTokens) -> Selection:
        length = tokens.keys[tokens.visual].double().mean(1).norm(dim=1)
        if len(tokens.visual) < len(tokens.visual_embeds):
            return Selection(highest(-relative(length), tokens.left))
        into, index = [], ascending(len(tokens.visual), tokens.visual.device)
        for some in index.split(tokens.pair.unique_consecutive(return_counts=True)[1].tolist()):
            count, x = max(1, int(self.centres * len(some))), tokens.visual_embeds[some]
            into.append(some[vicinity_clusters(x, tokens.place[some], count, self.cutoff, self.near)])
        return merged(torch.cat(into).unique(return_inverse=True)[1], length, tokens.left)


def merged(cluster: torch.Tensor, length: torch.Tensor, left: int) -> Selection:
    """Of each cluster the tokens with the shortest keys stay; its others become one token, at the place of the middle one.

    `cluster`: int64 `[n]`; if there are more than `left`, those of long keys become one. `length`: float64 `[n]`, of each key.
    """
    index, size = ascending(len(cluster), cluster.device), torch.bincount(cluster)
    total = torch.zeros(len(size), dtype=torch.float64, device=cluster.device).index_add_(0, cluster, length)
    order, spare, alone = ranked(-relative(total)), left - len(size), torch.zeros_like(size)
    if spare < 0:
        cluster = order.argsort().clamp(max=left - 1)[cluster]
        alone, size = alone[:left], torch.bincount(cluster)
    elif spare > 0:
        alone = ((size - 1).double() / (size - 1).sum() * spare).round().long()
        missing = spare - int(alone.sum())
        able = order[alone[order] < size[order] - 1] if missing > 0 else order[alone[order] > 0].flip(0)
        alone[able[: abs(missing)]] += 1 if missing > 0 else -1
    stays, joining = turns(ranked(-relative(length)), cluster) < alone[cluster], (size - alone)[cluster]
    middle = turns(stays.to(torch.int8).argsort(stable=True), cluster) == joining // 2
    to = torch.empty_like(size).index_copy_(0, cluster[middle], index[middle])
    return gathered(torch.where(stays, index, to[cluster]), torch.where(middle, joining + 1, 1).float())
