"""FlashVID's first stage, which keeps diverse and highly attended tokens, and merges temporally similar tokens."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.backend import greedy_cosine
from evoprune.contrib.shared import (
    Cosine,
    Count,
    Share,
    apportion,
    closest,
    gathered,
    joined_peaks,
    ranked,
    segments,
    transitions,
)
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap, spread


@dataclass(frozen=True)
class FlashVid(Selector):
    """FlashVID's first stage (arXiv 2602.08024), before the language model: keeps diverse tokens and merges similar tokens.

    The video is cut into at least `segments` segments, with a cut wherever two neighboring frame pairs have a cosine similarity
    below `threshold`. In each segment, a `diverse` fraction of the budget goes to tokens selected by max-min cosine distance times
    attention. Each remaining token is linked to the most similar token in the previous frame pair if their cosine similarity is
    above `link`. Links are added in descending order of similarity until the budget is met, and each tree of linked tokens is
    replaced by its mean. If there are still too many trees for the budget, they are merged around density peaks.

    Differences from the authors' code: this method averages each tree, as the paper describes. The authors' code divides the sum
    over the tree by one plus the number of direct links to the root. It also adds one link fewer than the budget requires and
    rounds token counts up in each frame pair.
    """

    name = "flashvid"
    source = "arXiv 2602.08024, the stage before the language model"
    needs = frozenset({"attention"})

    segments: Count = 4  # minimum number of segments
    # The video is always cut between neighboring frame pairs with a cosine similarity below this.
    threshold: Cosine = 0.9
    diverse: Share = 0.7  # fraction of the tokens selected by attention and diversity
    link: Cosine = 0.8  # minimum cosine similarity, exclusive, for a link to a token in the previous frame pair

    def select(self, tokens: Tokens, keep: int) -> Selection:
        shares = spread(keep, tokens.grid[0])
        attention = tokens.by_pair(snap(tokens.attention))
        x = tokens.by_pair(tokens.features.float())
        into = torch.full_like(attention, -1, dtype=torch.int64)
        weight = torch.ones_like(attention, dtype=torch.float32)
        for span in segments(transitions(tokens), self.segments, self.threshold):
            part = slice(span.start, span.stop)
            local, weight[part] = self.condensed(attention[part], x[part], sum(shares[part]))
            into[part] = torch.where(local < 0, -1, local + span.start * x.shape[1])
        return gathered(into.flatten(), weight.flatten())

    def condensed(self, attention: torch.Tensor, x: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Select and merge the tokens of one segment.

        Args:
            attention: `[g, n]`, the attention received by each token.
            x: `[g, n, D]`, the features.

        Returns:
            int64 `[g, n]`, the token that each token is merged into. Kept tokens map to themselves, and dropped tokens to -1.
            float32 `[g, n]`, each token's weight in the resulting mean.
        """
        pairs, per_pair = attention.shape
        index = arange_on(attention.numel(), x.device).view(pairs, per_pair)
        into = torch.full_like(index, -1).flatten()
        diverse = spread(math.floor(self.diverse * keep + 0.5), pairs)
        kept = [
            greedy_cosine(F.normalize(x[g].float(), dim=1), attention[g], None, 1.0, count, True)
            for g, count in enumerate(diverse)
        ]
        best = torch.cat([index[g, places] for g, places in enumerate(kept)])
        into[best] = best
        weight = torch.ones(len(into), dtype=torch.float32, device=x.device)
        trees = keep - len(best)
        if trees:
            x = x.flatten(0, 1)
            rest = (into < 0).nonzero().flatten()
            into[rest] = self.linked(F.normalize(x, dim=1), rest, rest // per_pair, len(rest) - trees)
            size = torch.bincount(into, minlength=len(into))
            weight = 1 / size[into].float()
            roots = rest[into[rest] == rest]
            if len(roots) > trees:
                mean = torch.zeros_like(x).index_add_(0, into, x * weight[:, None])[roots]
                into[rest] = self.merged(mean, roots, roots // per_pair, trees, into)[rest]
        return into.view_as(index), weight.view_as(index)

    def linked(self, unit: torch.Tensor, rest: torch.Tensor, pair: torch.Tensor, most: int) -> torch.Tensor:
        """Link similar tokens in neighboring frame pairs, starting with the most similar tokens.

        Args:
            unit: `[n, D]`, the segment's tokens, scaled to unit length.
            rest: int64 `[r]`, the tokens to link, ascending.
            pair: int64 `[r]`, the frame pairs of these tokens.
            most: The maximum number of links.

        Returns:
            int64 `[r]`, the root of each token's tree.
        """
        parent = rest.clone()
        like = torch.full((len(rest),), -torch.inf, dtype=torch.float32, device=unit.device)
        last = int(pair[-1])
        for g in range(1, last + 1):
            before = rest[pair == g - 1]
            now = pair == g
            if len(before) and now.any():
                like[now], to = closest(unit[rest[now]], unit[before])
                parent[now] = before[to]
        strongest = ranked(like)[:most]
        links = torch.zeros(len(rest), dtype=torch.bool, device=unit.device)
        links[strongest] = like[strongest] > self.link
        root = arange_on(len(unit), unit.device)
        for g in range(1, last + 1):  # each link leads to the previous frame pair, whose roots are already known
            now = links & (pair == g)
            root[rest[now]] = root[parent[now]]
        return root[rest]

    def merged(
        self, mean: torch.Tensor, roots: torch.Tensor, pair: torch.Tensor, keep: int, into: torch.Tensor
    ) -> torch.Tensor:
        """Merge trees around density peaks until `keep` trees are left.

        Args:
            mean: `[r, D]`, the tree means.
            roots: int64 `[r]`, the tree roots.
            pair: int64 `[r]`, the frame pairs of the roots.
            keep: The number of trees to leave.
            into: int64 `[n]`, each token's tree root.

        Returns:
            int64 `[n]`, the updated `into`.
        """
        sizes = torch.bincount(pair).tolist()
        to = torch.full_like(into, -1)
        counts = apportion(keep, sizes, sizes)
        for own, means, count in zip(roots.split(sizes), mean.split(sizes), counts, strict=True):
            if count:
                to[own] = own[joined_peaks(means, count)]
        return to[into]
