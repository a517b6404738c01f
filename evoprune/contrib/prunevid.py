"""PruneVid, first stage: still places become one token in scenes."""

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import NEIGHBOURS, averaged, gathered, join_groups, joined_peaks
from evoprune.methods import Cosine, Selection, Selector, Share, Tokens, apportion, arange_on, snap


@dataclass(frozen=True)
class PruneVid(Selector):
    """PruneVid (arXiv 2412.16117), the stage before the language model: still places become one token in each scene.

    Density peaks group frame pairs into clusters, `scenes` times as many as frame pairs; runs of a cluster are
    scenes, and the shorter ones join a neighbor. A place whose tokens have a mean cosine above `static` in a scene
    is still. If averaging still places saves enough, the stillest are averaged until the budget is met. Otherwise
    all of them are, and tokens merge around density peaks: the still ones of a scene, and the others of a frame
    pair, in proportion to their numbers.

    What differs: the budget sets the counts; the paper keeps half.
    """

    name = "prunevid"
    source = "arXiv 2412.16117, the stage before the language model"

    scenes: Share = 0.25  # number of clusters, as a share of the frame pairs
    static: Cosine = 0.8  # a place is static if the mean of its tokens over time is above this

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.by_pair(tokens.features.float())
        index = tokens.by_pair(arange_on(len(tokens.unit_to_row), x.device))
        spans = self.segments(x)
        steady = [steadiness(F.normalize(x[span.start : span.stop], dim=2)) for span in spans]
        into = averaged(index, spans, steady, self.static, keep)
        if into is not None:
            return gathered(into.flatten())
        groups = []  # for each group of tokens, the units of each, one row per token
        for span, places in zip(spans, (mean > self.static for mean in steady), strict=True):
            groups += [index[span.start : span.stop, places].T, *(index[pair, ~places][:, None] for pair in span)]
        sizes = [len(group) for group in groups]
        into = torch.full_like(tokens.unit_to_row, -1)
        counts = apportion(keep, sizes, sizes)
        return join_groups(into, x.flatten(0, 1), groups, counts)

    def segments(self, x: torch.Tensor) -> list[range]:
        """Runs of frame pairs of `x` (`[T, n, D]`) in one cluster."""
        cluster = joined_peaks(x.mean(1), max(1, int(self.scenes * len(x))), NEIGHBOURS)
        stops = list(accumulate(folded(cluster.tolist())))
        return [range(first, stop) for first, stop in pairwise([0, *stops])]


def folded(cluster: list[int]) -> list[int]:
    """Return the lengths of the segments of a video, from the cluster of each frame pair.

    The longest runs of a cluster stay, if they have two frame pairs or more. Others join the longer neighbour, or the earlier one.
    """
    runs = _runs(cluster)
    longest = {label: max(length for other, length in runs if other == label) for label in cluster}
    runs = _runs([label if length == longest[label] > 1 else -1 for label, length in runs for _ in range(length)])
    merged: list[tuple[int, int]] = []
    for (label, length), after in zip(runs, [*runs[1:], (-1, 0)], strict=True):
        before = merged[-1] if merged else (-1, 0)
        if label < 0:
            label = before[0] if before[1] >= after[1] else after[0]
        if label == before[0] and merged:
            length += merged.pop()[1]
        merged.append((label, length))
    return [length for _, length in merged]


def _runs(labels: list[int]) -> list[tuple[int, int]]:
    """Return each run of equal labels, with its length."""
    return [(label, len(list(run))) for label, run in groupby(labels)]


def steadiness(unit: torch.Tensor) -> torch.Tensor:
    """Return float32 `[n]`: the mean cosine of each two of a place's tokens (`[g, n, D]`, of length one or zero); -inf where g
    is 1.
    """
    count = len(unit) * (len(unit) - 1)
    if not count:
        return torch.full(unit.shape[1:2], -torch.inf, dtype=torch.float32, device=unit.device)
    return snap((unit.sum(0).square().sum(1) - unit.square().sum((0, 2))) / count)
