"""VisionZip (arXiv 2412.04467): the most attended tokens as they are, and means of the other tokens.

As in the paper: the tokens that receive most attention are dominant and stay as they are. Of the others, in order,
evenly spaced tokens are targets. Each other token joins the target with the most similar key, and the language model
reads the means. 85% of the kept tokens are dominant (54 of 64 and 162 of 192 in the paper). As in the authors' code
(dvlab-research/VisionZip), targets are a whole number of tokens apart, and a target weighs in its mean as much as all
tokens that join it.
Adapted: Qwen's tower has no class token, so attention is the mean over all queries of the last full-attention layer;
the keys come from there too. Their code adds the target and the mean of the others; here a token is half of that sum,
so it is about as long as any other. It stays at the target's place. An image of the paper is a frame pair here, and all
frame pairs have equal shares. Attention and cosines are rounded, so equal tokens are ties, which go by index.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.budget import spread
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import centre_weights, gathered, highest, nearest
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class VisionZip(Selector):
    """O(N K d / T) for T frame pairs and keys of d numbers. Fields:

    dominant: share of the kept tokens that attention selects.
    """

    name: ClassVar[str] = "visionzip"
    source: ClassVar[str] = "arXiv 2412.04467"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})

    dominant: float = 0.85

    def __post_init__(self):
        check_ranges(self, dominant="[0, 1]")

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        attention = snap(tokens.attention).view(pairs, per_pair)
        keys = F.normalize(tokens.keys, dim=1).view(pairs, per_pair, -1)
        into = torch.full_like(tokens.owner, -1).view(pairs, per_pair)
        for pair, share in enumerate(spread(keep, pairs)):
            local = zipped(attention[pair], keys[pair], share, round(self.dominant * share))
            into[pair] = torch.where(local < 0, -1, local + pair * per_pair)
        into = into.flatten()
        return gathered(into, centre_weights(into, 0.5))


def zipped(attention: torch.Tensor, keys: torch.Tensor, keep: int, dominant: int) -> torch.Tensor:
    """Which token of a frame pair each token joins.

    Args:
        attention: `[n]`.
        keys: `[n, d]`, of length one.
        keep: how many tokens stay.
        dominant: how many of these attention selects. If it is all of them, the other tokens are dropped.

    Returns:
        int64 `[n]`: the token that each joins, its own index if it stays, -1 if it is dropped.
    """
    index = ascending(len(attention), attention.device)
    into = torch.full_like(index, -1)
    best = highest(attention, dominant)
    into[best] = best
    rest = index[into < 0]
    targets = rest[index[: keep - dominant] * (len(rest) // max(1, keep - dominant))]
    if len(targets):
        into[rest] = targets[nearest(keys[rest], keys[targets])]
        into[targets] = targets
    return into
