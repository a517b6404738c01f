"""ViTCoP's stage inside the language model, which clusters nearby tokens and keeps the tokens with the shortest keys."""

from dataclasses import dataclass
from typing import Annotated

import torch

from evoprune.contrib.shared import BLOCK, Share, gathered, ranked, relative, rounded_distances, rounded_points, turns
from evoprune.methods import (
    LanguageMethod,
    LanguagePlan,
    LayerTokens,
    Selection,
    arange_on,
    highest,
    several_drops,
    snap,
)

FAR = 1 << 30  # greater than any distance, in steps


@dataclass(frozen=True)
class ViTCoP(LanguageMethod):
    """ViTCoP's stage inside the language model (arXiv 2601.17818): clusters nearby tokens and keeps those with the shortest keys.

    At the first drop, the tokens of each frame pair form clusters around density peaks, where each token follows the nearest denser
    token within a distance of `near`. In each cluster, the tokens with the shortest keys are kept, and the other tokens are
    replaced with their mean. At the second drop, only the tokens with the shortest keys are kept. The first drop takes O(n^2 D)
    time for the n tokens of a frame pair.

    Differences from the authors' code: the authors' means are twice as long, and the authors renumber the remaining tokens, while
    this method leaves their positions unchanged. This project tuned `cutoff`, the density scale relative to the root mean square
    distance, on validation clips.
    """

    name = "vitcop"
    source = "arXiv 2601.17818"
    default_share = (32 * 2 / 9 / 0.4 - 2) / 30  # a mean of 2/9 over all layers, after a stage that keeps 0.4

    centres: Share = 0.15  # number of clusters, as a fraction of a frame pair's token count
    cutoff: Annotated[float, "(0, inf)"] = 0.25  # density scale, relative to the root mean square distance
    # Maximum distance between a token and the token that it follows, in frame sizes.
    near: Annotated[float, "[0, inf)"] = 0.6

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
    """Keep the tokens with the shortest keys in each cluster, and merge the cluster's remaining tokens into their mean.

    The merged token takes the position of the middle token among those that it replaces. If there are more than `left` clusters,
    the clusters with the longest keys are first combined into one.

    Args:
        cluster: int64 `[n]`, each token's cluster.
        length: float64 `[n]`, the key lengths.
        left: The number of tokens in the selection.
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


def vicinity_clusters(x: torch.Tensor, place: torch.Tensor, count: int, cutoff: float, near: float) -> torch.Tensor:
    """Group the rows of `x` (`[n, D]`) into `count` clusters of similar and nearby rows (ViTCoP, arXiv 2601.17818).

    Each row follows its nearest denser row among the rows whose position (`place`, `[n, 2]`) is within a distance of `near`. If
    there is no such row, it follows the nearest denser row at any distance. Rows that lead to the same center form a cluster.
    Centers are the rows with the highest product of density and distance to the row that they would otherwise follow. The density
    is the sum of exp(-d^2) over all rows, where d is the distance divided by `cutoff` times the root mean square distance between
    rows. Among equally dense rows, the first is treated as denser. This takes O(n^2 D) time and O(n D) memory.

    Returns:
        int64 `[n]`, the index of each row's cluster center.
    """
    points = rounded_points(x)[0]
    scale = cutoff * (2 * (points - points.mean(0)).square().sum(1).mean()).sqrt().clamp(min=1)
    index = arange_on(len(points), x.device)
    place = place.double()
    blocks = index.split(BLOCK)
    dense = snap(
        torch.cat([(-(rounded_distances(points[block], points) / scale).square()).exp().sum(1) for block in blocks])
    )
    apart = torch.empty_like(dense)
    follows = torch.empty_like(index)
    for block in blocks:
        denser = (dense > dense[block, None]) | ((dense == dense[block, None]) & (index < block[:, None]))
        far = snap(torch.cdist(place[block], place) - near) > 0
        distance = (rounded_distances(points[block], points) + far * FAR).masked_fill(~denser, torch.inf)
        apart[block], follows[block] = distance.min(1)
    centres = highest(snap(dense * apart / scale), count)
    follows[centres] = centres
    for _ in range(len(points).bit_length()):
        follows = follows[follows]
    return follows
