"""PruneVid's first stage, which represents each static position with a single token per scene."""

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import NEIGHBOURS, Cosine, Share, apportion, averaged, gathered, join_groups, joined_peaks
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap


@dataclass(frozen=True)
class PruneVid(Selector):
    """PruneVid's first stage (arXiv 2412.16117), before the language model: keeps a single token per scene for each static
    position.

    Frame pairs are clustered around density peaks, with `scenes` times as many clusters as frame pairs. The longest run of
    consecutive frame pairs in each cluster becomes a scene if it has at least two frame pairs, and all other runs join a
    neighboring scene. A position is static within a scene if the mean cosine similarity of its tokens is above `static`. If
    averaging static positions over time saves enough tokens, positions are averaged until the budget is met, starting with the most
    static one. Otherwise, all static positions are averaged, and the tokens then merge around density peaks. Tokens at static
    positions merge within their scene, and all other tokens merge within their frame pair. Each of these groups keeps tokens in
    proportion to its size.

    Differences from the paper: the paper always keeps half of the tokens. Here, the budget determines how many tokens are kept.
    """

    name = "prunevid"
    source = "arXiv 2412.16117, the stage before the language model"

    scenes: Share = 0.25  # number of clusters, as a fraction of the number of frame pairs
    static: Cosine = 0.8  # a position is static if the mean cosine similarity of its tokens is above this

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.by_pair(tokens.features.float())
        index = tokens.by_pair(arange_on(len(tokens.unit_to_row), x.device))
        spans = self.segments(x)
        steady = [steadiness(F.normalize(x[span.start : span.stop], dim=2)) for span in spans]
        into = averaged(index, spans, steady, self.static, keep)
        if into is not None:
            return gathered(into.flatten())
        groups = []  # the units of each group's tokens, one row per token
        for span, places in zip(spans, (mean > self.static for mean in steady), strict=True):
            groups += [index[span.start : span.stop, places].T, *(index[pair, ~places][:, None] for pair in span)]
        sizes = [len(group) for group in groups]
        into = torch.full_like(tokens.unit_to_row, -1)
        counts = apportion(keep, sizes, sizes)
        return join_groups(into, x.flatten(0, 1), groups, counts)

    def segments(self, x: torch.Tensor) -> list[range]:
        """Divide a video into scenes, which are runs of similar frame pairs. `x` is `[T, n, D]`, the video's features."""
        cluster = joined_peaks(x.mean(1), max(1, int(self.scenes * len(x))), NEIGHBOURS)
        stops = list(accumulate(folded(cluster.tolist())))
        return [range(first, stop) for first, stop in pairwise([0, *stops])]


def folded(cluster: list[int]) -> list[int]:
    """Return the scene lengths of a video, in frame pairs, given each frame pair's cluster.

    The longest run in each cluster becomes a scene if it has at least two frame pairs. Other runs join the longer of their two
    neighbors, or the earlier one if both are equally long.
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
    """Return the runs of equal labels, as (label, length) pairs."""
    return [(label, len(list(run))) for label, run in groupby(labels)]


def steadiness(unit: torch.Tensor) -> torch.Tensor:
    """Return how static each position is: the mean cosine similarity over all pairs of its tokens, as float32 `[n]`.

    `unit` is `[g, n, D]`, the tokens of g frame pairs, with a length of one or zero. With only one frame pair, the result is -inf.
    """
    count = len(unit) * (len(unit) - 1)
    if not count:
        return torch.full(unit.shape[1:2], -torch.inf, dtype=torch.float32, device=unit.device)
    return snap((unit.sum(0).square().sum(1) - unit.square().sum((0, 2))) / count)
