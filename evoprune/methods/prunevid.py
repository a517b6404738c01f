"""PruneVid (arXiv 2412.16117), the stage before the language model: averages what stands still over time, then merges neighbours.

As in the paper: frame pairs are clustered around density peaks, a quarter as many as there are frame pairs. A place is
static in a segment if the mean cosine of its tokens, each with each, is above 0.8. Then its tokens become one, the
mean. The static tokens of a segment are merged around density peaks, and so are the other tokens of each frame pair.
As in the authors' code (Visual-AI/PruneVid): a segment is a run of frame pairs of one cluster. Of each cluster only the
longest runs stay, if they are of two frame pairs or more; what lies between two runs that stay joins the longer of
them, or the earlier one.
Adapted: the paper merges to a half and leaves the rest to the language model; groups of 14 tokens or fewer are not
merged there. Here merging continues down to the budget, which is shared in proportion to the numbers of tokens. If
averaging saves too much, only the most static places are averaged, and the last of them over fewer frame pairs. A mean
has the place of its peak, or of its first frame pair.
Left out: the stage inside the language model, which uses the question's attention.
"""

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.budget import apportion
from evoprune.pruning.density import join_groups, joined_peaks
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import gathered
from evoprune.pruning.score import snap
from evoprune.pruning.segments import averaged
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class PruneVid(Selector):
    """O(N n D) for n tokens per frame pair, memory O(N D). Fields:

    scenes: number of clusters, as a share of the frame pairs.
    static: a place is static if the mean cosine of its tokens over time is above this.
    neighbours: how many nearest tokens a density is computed from.
    """

    name: ClassVar[str] = "prunevid"
    source: ClassVar[str] = "arXiv 2412.16117, the stage before the language model"

    scenes: float = 0.25
    static: float = 0.8
    neighbours: int = 7

    def __post_init__(self):
        check_ranges(self, scenes="[0, 1]", static="[-1, 1]", neighbours="[1, inf)")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.features.float().view(tokens.grid[0], -1, tokens.features.shape[1])
        index = ascending(len(tokens.owner), x.device).view(x.shape[:2])
        spans = self.segments(x)
        steady = [steadiness(F.normalize(x[span.start : span.stop], dim=2)) for span in spans]
        static = [mean > self.static for mean in steady]
        saved = sum(int(places.sum()) * (len(span) - 1) for span, places in zip(spans, static, strict=True))
        if index.numel() - saved <= keep:
            return gathered(averaged(index, spans, steady, index.numel() - keep).flatten())
        into = torch.full_like(tokens.owner, -1)
        weight = torch.ones(len(into), dtype=torch.float32, device=x.device)
        groups = []  # for each group of tokens, the units of each, one row per token
        for span, places in zip(spans, static, strict=True):
            groups += [index[span.start : span.stop, places].T, *(index[pair, ~places][:, None] for pair in span)]
        sizes = [len(group) for group in groups]
        join_groups(into, weight, x.flatten(0, 1), groups, apportion(keep, sizes, sizes), self.neighbours)
        return gathered(into, weight)

    def segments(self, x: torch.Tensor) -> list[range]:
        """Runs of frame pairs of `x` (`[T, n, D]`) in one cluster."""
        cluster = joined_peaks(x.mean(1), max(1, int(self.scenes * len(x))), self.neighbours)
        stops = list(accumulate(folded(cluster.tolist())))
        return [range(first, stop) for first, stop in pairwise([0, *stops])]


def folded(cluster: list[int]) -> list[int]:
    """The lengths of the segments of a video.

    Only the longest runs of a cluster stay, and only if they have two frame pairs or more. What is between two runs joins the
    longer of them, or the earlier of equals.

    Args:
        cluster: the cluster of each frame pair.
    """
    runs = _runs(cluster)
    longest = {label: max(length for other, length in runs if other == label) for label in cluster}
    runs = _runs([label if length == longest[label] > 1 else -1 for label, length in runs for _ in range(length)])
    made: list[tuple[int, int]] = []
    for (label, length), after in zip(runs, [*runs[1:], (-1, 0)], strict=True):
        before = made[-1] if made else (-1, 0)
        if label < 0:
            label = before[0] if before[1] >= after[1] else after[0]
        if label == before[0] and made:
            length += made.pop()[1]
        made.append((label, length))
    return [length for _, length in made]


def _runs(labels: list[int]) -> list[tuple[int, int]]:
    """Each run of equal labels, with its length."""
    return [(label, len(list(run))) for label, run in groupby(labels)]


def steadiness(unit: torch.Tensor) -> torch.Tensor:
    """float32 `[n]`: the mean cosine of each two tokens of a place; -inf if there is one frame pair.

    Args:
        unit: `[g, n, D]`, features of g frame pairs, of length one or zero.
    """
    count = len(unit) * (len(unit) - 1)
    if not count:
        return torch.full(unit.shape[1:2], -torch.inf, dtype=torch.float32, device=unit.device)
    return snap((unit.sum(0).square().sum(1) - unit.square().sum((0, 2))) / count)
