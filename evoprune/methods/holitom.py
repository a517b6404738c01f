"""HoliTom (arXiv 2505.21334), the stage before the language model: segments that save most by averaging what stands still.

As in the paper: a place stands still in a segment if each of its tokens has a cosine above 0.8 to the next. Dynamic
programming cuts the video so that most tokens are saved. A place that stands still becomes one token, the mean, in its
first frame pair. Of the other tokens, each frame pair keeps the most attended ones. The means of a segment are merged
around density peaks.
As in the authors' code (cokeshao/HoliTom): a peak weighs 0.6 in its mean, and all tokens around it together weigh 0.4.
Of cuts that save equally much, the one with the shortest last segments is taken. Densities are of as many neighbours as
there are peaks, if these are fewer than 7, but never fewer than 2, because with one neighbour, itself, every token is
as dense. With one or two peaks their noise decides.
Adapted: exactly the budget is kept, shared in proportion to the numbers of tokens. If averaging saves too much, only
the stillest places are averaged, and the last of them over fewer frame pairs. Attention is received in the tower's last
full-attention layer.
Left out: merging inside the language model.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evoprune.methods.base import Selector
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.budget import apportion
from evoprune.pruning.density import join_groups
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import gathered, highest
from evoprune.pruning.score import snap
from evoprune.pruning.segments import averaged
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class HoliTom(Selector):
    """O(N D + T^2 + N n D / L) for n tokens per frame pair and segments of L frame pairs, memory O(N D). Fields:

    static: a place stands still if the cosines of its neighbouring tokens are above this.
    neighbours: how many nearest tokens a density is computed from.
    centre: the least weight of a peak in its mean.
    """

    name: ClassVar[str] = "holitom"
    source: ClassVar[str] = "arXiv 2505.21334, the stage before the language model"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    static: float = 0.8
    neighbours: int = 7
    centre: float = 0.6

    def __post_init__(self):
        check_ranges(self, static="[-1, 1]", centre="(0, 1]", neighbours="[1, inf)")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.features.float().view(tokens.grid[0], -1, tokens.features.shape[1])
        index = ascending(len(tokens.owner), x.device).view(x.shape[:2])
        cosine = snap(torch.cosine_similarity(x[1:], x[:-1], dim=2))
        spans = most_saving(cosine > self.static)
        least = [stillness(cosine, span, index.shape[1]) for span in spans]
        still = [lowest > self.static for lowest in least]
        saved = sum(int(places.sum()) * (len(span) - 1) for span, places in zip(spans, still, strict=True))
        if index.numel() - saved <= keep:
            return gathered(averaged(index, spans, least, index.numel() - keep).flatten())
        attention = snap(tokens.attention)
        into = torch.full_like(tokens.owner, -1)
        weight = torch.ones(len(into), dtype=torch.float32, device=x.device)
        # The units of the places that stand still, one row per place; and the others of each frame pair.
        groups = [index[span.start : span.stop, places].T for span, places in zip(spans, still, strict=True)]
        moving = [index[pair, ~places] for span, places in zip(spans, still, strict=True) for pair in span]
        sizes = [len(group) for group in (*groups, *moving)]
        counts = apportion(keep, sizes, sizes)
        join_groups(into, weight, x.flatten(0, 1), groups, counts[: len(groups)], self.neighbours, self.centre)
        for some, count in zip(moving, counts[len(groups) :], strict=True):
            best = some[highest(attention[some], count)]
            into[best] = best
        return gathered(into, weight)


def most_saving(same: torch.Tensor) -> list[range]:
    """The segments that save most tokens, by dynamic programming, as ranges of frame pairs in order.

    A segment of L frame pairs saves L - 1 tokens for each place that does not change in it.

    Args:
        same: bool `[T - 1, n]`, whether each token is similar to the next one at its place.
    """
    back, backs = torch.zeros(same.shape[1], dtype=torch.int64, device=same.device), []
    for each in same:  # counts for how many frame pairs each place has not changed
        back = (back + 1) * each
        backs.append(torch.bincount(back, minlength=len(same) + 1))
    # still[t][n]: the places that have not changed in the last n steps up to frame pair t + 1
    still = torch.stack(backs).flip(1).cumsum(1).flip(1).tolist() if backs else []
    best, start = [0, 0], [0, 0]  # for the first t frame pairs: tokens saved, and the start of the last segment
    for last in range(1, len(same) + 1):
        # The last segment has length + 1 frame pairs; of those that save equally much, the shortest.
        saves = [best[last - length] + length * (length and still[last - 1][length]) for length in range(last + 1)]
        best.append(max(saves))
        start.append(last - saves.index(best[-1]))
    spans, stop = [], len(same) + 1
    while stop:
        spans.append(range(start[stop], stop))
        stop = start[stop]
    return spans[::-1]


def stillness(cosine: torch.Tensor, span: range, places: int) -> torch.Tensor:
    """float32 `[n]`: the least cosine of neighbouring tokens at each place of a segment; -inf if it has one frame pair.

    Args:
        cosine: `[T - 1, n]`, of each token to the next one at its place.
        span: the frame pairs of the segment.
        places: n.
    """
    if len(span) == 1:
        return torch.full((places,), -torch.inf, dtype=torch.float32, device=cosine.device)
    return cosine[span.start : span.stop - 1].amin(0)
