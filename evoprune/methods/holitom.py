"""HoliTom (arXiv 2505.21334), the stage before the language model: segments that save most by averaging what stands still."""

from dataclasses import dataclass
from typing import Annotated

import torch

from evoprune.methods.base import Selector
from evoprune.methods.settings import Cosine, Count
from evoprune.pruning.budget import apportion
from evoprune.pruning.density import join_groups
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import gathered, highest, snap
from evoprune.pruning.segments import averaged
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class HoliTom(Selector):
    name = "holitom"
    source = "arXiv 2505.21334, the stage before the language model"
    needs = frozenset({"attention"})

    static: Cosine = 0.8  # a place stands still if its neighbouring tokens are above this
    neighbours: Count = 7  # a density is computed from so many nearest tokens
    centre: Annotated[float, "(0, 1]"] = 0.6  # least weight of a peak in its mean

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.by_pair(tokens.features.float())
        index = tokens.by_pair(ascending(len(tokens.owner), x.device))
        cosine = snap(torch.cosine_similarity(x[1:], x[:-1], dim=2))
        spans = most_saving(cosine > self.static)
        alone = torch.full(x.shape[1:2], -torch.inf, dtype=torch.float32, device=x.device)
        least = [cosine[span.start : span.stop - 1].amin(0) if len(span) > 1 else alone for span in spans]
        into = averaged(index, spans, least, self.static, keep)
        if into is not None:
            return gathered(into.flatten())
        attention, into = snap(tokens.attention), torch.full_like(tokens.owner, -1)
        still = [lowest > self.static for lowest in least]
        # The units of the places that stand still, one row per place; and the others of each frame pair.
        groups = [index[span.start : span.stop, places].T for span, places in zip(spans, still, strict=True)]
        moving = [index[pair, ~places] for span, places in zip(spans, still, strict=True) for pair in span]
        sizes = [len(group) for group in (*groups, *moving)]
        counts = apportion(keep, sizes, sizes)
        for some, count in zip(moving, counts[len(groups) :], strict=True):
            best = some[highest(attention[some], count)]
            into[best] = best
        return join_groups(into, x.flatten(0, 1), groups, counts[: len(groups)], self.neighbours, self.centre)


def most_saving(same: torch.Tensor) -> list[range]:
    """The segments that save most tokens, by dynamic programming: of L frame pairs L - 1 for each place that does not change.

    `same`: bool `[T - 1, n]`, whether each token is similar to the next one at its place.
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
