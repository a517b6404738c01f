"""Selectors that cut a video into segments: FastVID, FlashVID, MMG-Vid, PruneVid, HoliTom."""

import math
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.contrib.common import (
    NEIGHBOURS,
    centre_weights,
    gathered,
    join_groups,
    joined_peaks,
    peak_scores,
    peaks,
    segments,
    transitions,
)
from evoprune.methods.base import Selector
from evoprune.methods.baselines import most_diverse
from evoprune.methods.plans import apportion, spread
from evoprune.methods.ranking import closest, highest, ranked, snap
from evoprune.methods.settings import Cosine, Count, Share
from evoprune.methods.types import Selection, Tokens, arange_on


@dataclass(frozen=True)
class FastVid(Selector):
    name = "fastvid"
    source = "arXiv 2503.11187"
    needs = frozenset({"attention"})

    segments: Count = 8  # the least number of segments
    threshold: Cosine = 0.84  # of neighbouring frame pairs; below it the video is always cut
    salient: Share = 0.6  # share of the tokens that attention selects
    ignore: Cosine = 0.95  # of a frame pair and the next one; from here on none of its tokens stay
    every: Count = 4  # peaks are searched in one of so many frame pairs
    centre: Annotated[float, "(0, 1]"] = 0.6  # least weight of a peak in its mean

    def select(self, tokens: Tokens, keep: int) -> Selection:
        like = transitions(tokens)
        shares = spread(keep, tokens.grid[0])
        x = tokens.features
        attention = snap(tokens.attention)
        into = torch.full_like(tokens.unit_to_row, -1)
        index = tokens.by_pair(arange_on(len(x), x.device))
        for span in segments(like, self.segments, self.threshold):
            new = (like[span.start : span.stop - 1] < self.ignore).nonzero().flatten().tolist()
            part = slice(span.start, span.stop)
            self.condense(x, attention, index[part], [*new, len(span) - 1], sum(shares[part]), into)
        return gathered(into, centre_weights(into, self.centre))

    def condense(
        self,
        x: torch.Tensor,
        attention: torch.Tensor,
        index: torch.Tensor,
        new: list[int],
        keep: int,
        into: torch.Tensor,
    ) -> None:
        """Writes to `into` (int64 `[N]`) which unit each unit of a segment joins: `keep` themselves, others peaks or nothing.

        `x`, `attention`: `[N, D]`, `[N]`. `index`: int64 `[g, n]`, the segment's units. `new`: its frame pairs unlike the next one.
        """
        half = index.shape[1] // 2
        context = min(keep, max(1, int((1 - self.salient) * keep)))
        anchors = new[:: -self.every]
        wanted = dict(zip(anchors, apportion(context, [1] * len(anchors), [half] * len(anchors)), strict=True))
        max_counts = [index.shape[1] - wanted.get(pair, 0) for pair in new]
        salient = zip(new, apportion(keep - context, [1] * len(new), max_counts), strict=True)
        best = torch.cat([index[pair, highest(attention[index[pair]], count)] for pair, count in salient])
        into[best] = best
        free = {pair: index[pair][into[index[pair]] < 0] for pair in anchors}
        centres = torch.cat([units[peaks(x[units], wanted[pair], 4)] for pair, units in free.items()])
        into[centres] = centres
        rest = index[into[index] < 0]
        more = rest[highest(attention[rest], keep - len(best) - len(centres))]
        into[more] = more
        rest = rest[into[rest] < 0]
        if len(centres):
            unit, peak = (F.normalize(x[units].float(), dim=1) for units in (rest, centres))
            into[rest] = centres[closest(unit, peak)[1]]


@dataclass(frozen=True)
class FlashVid(Selector):
    name = "flashvid"
    source = "arXiv 2602.08024, the stage before the language model"
    needs = frozenset({"attention"})

    segments: Count = 4  # the least number of segments
    threshold: Cosine = 0.9  # of neighbouring frame pairs; below it the video is always cut
    diverse: Share = 0.7  # share of the tokens that attention and diversity select
    link: Cosine = 0.8  # above this, a token may be linked to one of the frame pair before

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
        """Return which token of the segment each joins, int64 `[g, n]`, itself if it stays, -1 if it is dropped; and its weight,
        float32.

        `attention`: `[g, n]`. `x`: `[g, n, D]`, features. `keep`: how many tokens stay.
        """
        pairs, per_pair = attention.shape
        index = arange_on(attention.numel(), x.device).view(pairs, per_pair)
        into = torch.full_like(index, -1).flatten()
        diverse = spread(math.floor(self.diverse * keep + 0.5), pairs)
        best = torch.cat([index[g, most_diverse(x[g], count, attention[g])] for g, count in enumerate(diverse)])
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
        """Return int64 `[r]`: the root of each one's tree of at most `most` links, the strongest first.

        `unit`: `[n, D]`, all of the segment. `rest`, `pair`: int64 `[r]`, those to link, ascending, and their frame pairs.
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
        for g in range(1, last + 1):  # a link leads to the frame pair before, whose roots are known by now
            now = links & (pair == g)
            root[rest[now]] = root[parent[now]]
        return root[rest]

    def merged(
        self, mean: torch.Tensor, roots: torch.Tensor, pair: torch.Tensor, keep: int, into: torch.Tensor
    ) -> torch.Tensor:
        """Return `into` (int64 `[n]`, the root of each token) after trees are merged around density peaks until `keep` are left.

        `mean`: `[r, D]`, of each tree. `roots`, `pair`: int64 `[r]`, its root and the root's frame pair.
        """
        sizes = torch.bincount(pair).tolist()
        to = torch.full_like(into, -1)
        counts = apportion(keep, sizes, sizes)
        for own, means, count in zip(roots.split(sizes), mean.split(sizes), counts, strict=True):
            if count:
                to[own] = own[joined_peaks(means, count)]
        return to[into]


@dataclass(frozen=True)
class Mmg(Selector):
    name = "mmg"
    source = "after arXiv 2508.21044, whose formulas this project fills in"

    threshold: Cosine = 0.95  # of neighbouring frame pairs; below it the video is cut
    beta: Share = 0.5  # weight of repetition in the gain of a segment

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.by_pair(tokens.features.float())
        like = transitions(tokens)
        spans = joined(segments(like, 1, self.threshold), like.tolist())
        means = torch.stack([x[span.start : span.stop].mean((0, 1)) for span in spans])
        gains = marginal_gains(means, x.mean((0, 1)), self.beta)
        weights = [len(span) * math.exp(gain) for span, gain in zip(spans, gains, strict=True)]
        shares = apportion(keep, weights, [len(span) * x.shape[1] for span in spans])
        kept = [self.distinct(x, span, share) for span, share in zip(spans, shares, strict=True)]
        return Selection(torch.cat(kept))

    def distinct(self, x: torch.Tensor, span: range, keep: int) -> torch.Tensor:
        """Return int64 `[keep]`, ascending: tokens of a segment that are density peaks and differ from the frame pair before.

        `x`: `[T, n, D]`, the features of the video.
        """
        kept = []
        before = None
        for pair, share in zip(span, spread(keep, len(span)), strict=True):
            gain = peak_scores(x[pair], NEIGHBOURS)
            unit = F.normalize(x[pair], dim=1)
            if before is not None and len(before):
                gain = snap(gain + (1 - closest(unit, before)[0]).log())  # logarithms, so factors are added
            best = highest(gain, share)
            before = unit[best]
            kept.append(best + pair * x.shape[1])
        return torch.cat(kept)


def joined(spans: list[range], like: list[float]) -> list[range]:
    """Return the segments after each of one frame pair has joined the more similar neighbour.

    `like`: cosines as of `transitions`.
    """
    merged: list[range] = []
    for number, span in enumerate(spans):
        right = like[span.stop - 1] if number + 1 < len(spans) else -math.inf
        if merged and (len(merged[-1]) == 1 or (len(span) == 1 and like[span.start - 1] >= right)):
            span = range(merged.pop().start, span.stop)
        merged.append(span)
    return merged


def marginal_gains(means: torch.Tensor, video: torch.Tensor, beta: float) -> list[float]:
    """Return the gain of each segment when the segment of highest gain is always taken next.

    The gain is the cosine of its mean (one of `means`, `[S, D]`) to that of the `video` (`[D]`), less `beta` times the greatest
    cosine to a segment taken before.
    """
    unit = F.normalize(means, dim=1)
    represents = snap(unit @ F.normalize(video, dim=0))
    repeats = torch.zeros_like(represents)
    gains = torch.full_like(represents, -torch.inf)
    open_ = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    for step in range(len(unit)):
        now = represents - beta * repeats
        best = int(now.masked_fill(~open_, -torch.inf).argmax())
        gains[best] = now[best]
        open_[best] = False
        to = snap(unit @ unit[best])
        if step:
            to = torch.maximum(repeats, to)
        repeats = to
    return gains.tolist()


@dataclass(frozen=True)
class PruneVid(Selector):
    """Prune in clusters of frame pairs; then merge neighbours."""

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


@dataclass(frozen=True)
class HoliTom(Selector):
    """Prune in the segments that save most."""

    name = "holitom"
    source = "arXiv 2505.21334, the stage before the language model"
    needs = frozenset({"attention"})

    static: Cosine = 0.8  # a place stands still if its neighbouring tokens are above this
    centre: Annotated[float, "(0, 1]"] = 0.6  # least weight of a peak in its mean

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.by_pair(tokens.features.float())
        index = tokens.by_pair(arange_on(len(tokens.unit_to_row), x.device))
        cosine = snap(torch.cosine_similarity(x[1:], x[:-1], dim=2))
        spans = most_saving(cosine > self.static)
        alone = torch.full(x.shape[1:2], -torch.inf, dtype=torch.float32, device=x.device)
        min_cosines = [cosine[span.start : span.stop - 1].amin(0) if len(span) > 1 else alone for span in spans]
        into = averaged(index, spans, min_cosines, self.static, keep)
        if into is not None:
            return gathered(into.flatten())
        attention = snap(tokens.attention)
        into = torch.full_like(tokens.unit_to_row, -1)
        still = [lowest > self.static for lowest in min_cosines]
        # The units of the places that stand still, one row per place; and the others of each frame pair.
        groups = [index[span.start : span.stop, places].T for span, places in zip(spans, still, strict=True)]
        moving = [index[pair, ~places] for span, places in zip(spans, still, strict=True) for pair in span]
        sizes = [len(group) for group in (*groups, *moving)]
        counts = apportion(keep, sizes, sizes)
        for units, count in zip(moving, counts[len(groups) :], strict=True):
            best = units[highest(attention[units], count)]
            into[best] = best
        return join_groups(into, x.flatten(0, 1), groups, counts[: len(groups)], self.centre)


def most_saving(same: torch.Tensor) -> list[range]:
    """Return the segments that save most tokens, by dynamic programming: of L frame pairs L - 1 for each place that does not
    change.

    `same`: bool `[T - 1, n]`, whether each token is similar to the next one at its place.
    """
    back = torch.zeros(same.shape[1], dtype=torch.int64, device=same.device)
    backs = []
    for unchanged in same:  # counts for how many frame pairs each place has not changed
        back = (back + 1) * unchanged
        backs.append(torch.bincount(back, minlength=len(same) + 1))
    # still[t][n]: the places that have not changed in the last n steps up to frame pair t + 1
    still = torch.stack(backs).flip(1).cumsum(1).flip(1).tolist() if backs else []
    # for the first t frame pairs: tokens saved, and the start of the last segment
    best = [0, 0]
    start = [0, 0]
    for last in range(1, len(same) + 1):
        # The last segment has length + 1 frame pairs; of those that save equally much, the shortest.
        saves = [best[last - length] + length * (length and still[last - 1][length]) for length in range(last + 1)]
        best.append(max(saves))
        start.append(last - saves.index(best[-1]))
    spans = []
    stop = len(same) + 1
    while stop:
        spans.append(range(start[stop], stop))
        stop = start[stop]
    return spans[::-1]


def averaged(
    index: torch.Tensor, spans: list[range], still: list[torch.Tensor], limit: float, keep: int
) -> torch.Tensor | None:
    """Return int64 `[T, n]`: the unit that each joins when the stillest places are averaged over time until `keep` units are left.

    Places are averaged over their segment (`spans`); the last one over as many of its first frame pairs as necessary.

    Args:
        index: int64 `[T, n]`, the numbers of the units.
        still: for each segment, `[n]`, how still each place stands; ties go by index. Only those above `limit` are averaged.

    Returns None if more than `keep` are left.
    """
    into = index.clone()
    n = index.shape[1]
    saved = index.numel() - keep
    if sum(int((cosine > limit).sum()) * (len(span) - 1) for span, cosine in zip(spans, still, strict=True)) < saved:
        return None
    for best in torch.cat(still).argsort(descending=True, stable=True).tolist():
        if not saved:
            break
        span = spans[best // n]
        place = best % n
        fewer = min(saved, len(span) - 1)
        into[span.start : span.start + fewer + 1, place] = index[span.start, place]
        saved -= fewer
    return into
