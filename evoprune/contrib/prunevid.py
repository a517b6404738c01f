"""PruneVid (arXiv 2412.16117) and HoliTom (arXiv 2505.21334), the stages before the language model: what is still is averaged."""

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.contrib.density import join_groups, joined_peaks
from evoprune.methods.base import Selector
from evoprune.methods.plans import apportion
from evoprune.methods.ranking import gathered, highest, snap
from evoprune.methods.settings import Cosine, Count, Share
from evoprune.methods.types import Selection, Tokens, ascending


@dataclass(frozen=True)
class PruneVid(Selector):
    """In clusters of frame pairs; then neighbours merge."""

    name = "prunevid"
    source = "arXiv 2412.16117, the stage before the language model"

    scenes: Share = 0.25  # number of clusters, as a share of the frame pairs
    static: Cosine = 0.8  # a place is static if the mean of its tokens over time is above this
    neighbours: Count = 7  # a density is computed from so many nearest tokens

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.by_pair(tokens.features.float())
        index = tokens.by_pair(ascending(len(tokens.owner), x.device))
        spans = self.segments(x)
        steady = [steadiness(F.normalize(x[span.start : span.stop], dim=2)) for span in spans]
        into = averaged(index, spans, steady, self.static, keep)
        if into is not None:
            return gathered(into.flatten())
        groups = []  # for each group of tokens, the units of each, one row per token
        for span, places in zip(spans, (mean > self.static for mean in steady), strict=True):
            groups += [index[span.start : span.stop, places].T, *(index[pair, ~places][:, None] for pair in span)]
        sizes = [len(group) for group in groups]
        into, counts = torch.full_like(tokens.owner, -1), apportion(keep, sizes, sizes)
        return join_groups(into, x.flatten(0, 1), groups, counts, self.neighbours)

    def segments(self, x: torch.Tensor) -> list[range]:
        """Runs of frame pairs of `x` (`[T, n, D]`) in one cluster."""
        cluster = joined_peaks(x.mean(1), max(1, int(self.scenes * len(x))), self.neighbours)
        stops = list(accumulate(folded(cluster.tolist())))
        return [range(first, stop) for first, stop in pairwise([0, *stops])]


def folded(cluster: list[int]) -> list[int]:
    """The lengths of the segments of a video, from the cluster of each frame pair.

    The longest runs of a cluster stay, if they have two frame pairs or more. Others join the longer neighbour, or the earlier one.
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
    """float32 `[n]`: the mean cosine of each two of a place's tokens (`[g, n, D]`, of length one or zero); -inf where g is 1."""
    count = len(unit) * (len(unit) - 1)
    if not count:
        return torch.full(unit.shape[1:2], -torch.inf, dtype=torch.float32, device=unit.device)
    return snap((unit.sum(0).square().sum(1) - unit.square().sum((0, 2))) / count)


@dataclass(frozen=True)
class HoliTom(Selector):
    """In the segments that save most."""

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


def averaged(
    index: torch.Tensor, spans: list[range], still: list[torch.Tensor], limit: float, keep: int
) -> torch.Tensor | None:
    """int64 `[T, n]`: the unit that each joins when the stillest places are averaged over time until `keep` units are left.

    Places are averaged over their segment (`spans`); the last one over as many of its first frame pairs as necessary.

    Args:
        index: int64 `[T, n]`, the numbers of the units.
        still: for each segment, `[n]`, how still each place stands; ties go by index. Only those above `limit` are averaged.

    Returns None if more than `keep` are left.
    """
    into, n, saved = index.clone(), index.shape[1], index.numel() - keep
    if sum(int((each > limit).sum()) * (len(span) - 1) for span, each in zip(spans, still, strict=True)) < saved:
        return None
    for best in torch.cat(still).argsort(descending=True, stable=True).tolist():
        if not saved:
            break
        span, place = spans[best // n], best % n
        fewer = min(saved, len(span) - 1)
        into[span.start : span.start + fewer + 1, place] = index[span.start, place]
        saved -= fewer
    return into
