"""FlashVID, first stage: diverse attended tokens, and trees of similar tokens over time."""

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
    """FlashVID (arXiv 2602.08024), the stage before the language model: diverse tokens, and trees of similar ones.

    The video is cut into at least `segments` segments, and wherever neighboring frame pairs have a cosine below `threshold`. In a
    segment, `diverse` of the budget goes to tokens selected by max-min cosine distance times attention. Any other token may link to
    the most similar one in the previous frame pair if the cosine is above `link`, the strongest links first. A tree of links
    becomes its mean. If there are more trees than tokens left, trees merge around density peaks.

    What differs: the authors' code divides a tree's sum by one more than the root's direct links; the paper speaks of means, which
    are used here. The code also makes one link fewer than the budget needs, and rounds up per frame pair.
    """

    name = "flashvid"
    source = "arXiv 2602.08024, the stage before the language model"
    needs = frozenset({"attention"})

    segments: Count = 4  # minimum number of segments
    threshold: Cosine = 0.9  # cosine of neighboring frame pairs below which the video is always cut
    diverse: Share = 0.7  # share of the tokens that attention and diversity select
    link: Cosine = 0.8  # cosine above which a token may link to one in the previous frame pair

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
        """Return the token of the segment that each token joins, and its weight in the mean.

        Args:
            attention: `[g, n]`.
            x: `[g, n, D]`, the features.
            keep: Number of tokens that stay.

        Returns:
            int64 `[g, n]`, the token itself if it stays, or -1 if it is dropped; float32 `[g, n]` weights.
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
        """Return int64 `[r]`: the root of a token's tree after making at most `most` links, the strongest first.

        Args:
            unit: `[n, D]`, all tokens of the segment.
            rest: int64 `[r]`, the tokens to link, ascending.
            pair: int64 `[r]`, their frame pairs.
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
        for g in range(1, last + 1):  # a link leads to the previous frame pair, whose roots are known by now
            now = links & (pair == g)
            root[rest[now]] = root[parent[now]]
        return root[rest]

    def merged(
        self, mean: torch.Tensor, roots: torch.Tensor, pair: torch.Tensor, keep: int, into: torch.Tensor
    ) -> torch.Tensor:
        """Return `into` after merging trees around density peaks until `keep` are left.

        Args:
            mean: `[r, D]`, the trees' means.
            roots: int64 `[r]`, the trees' roots.
            pair: int64 `[r]`, the roots' frame pairs.
            into: int64 `[n]`, for each token the root of its tree.
        """
        sizes = torch.bincount(pair).tolist()
        to = torch.full_like(into, -1)
        counts = apportion(keep, sizes, sizes)
        for own, means, count in zip(roots.split(sizes), mean.split(sizes), counts, strict=True):
            if count:
                to[own] = own[joined_peaks(means, count)]
        return to[into]
