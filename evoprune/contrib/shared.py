"""Helpers for the methods in this package: setting types, ranking, apportionment, segments, density peaks, means, and relevance."""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.methods import Selection, Tokens, arange_on, highest, snap

# Setting types: numbers with a valid range.
Share = Annotated[float, "[0, 1]"]
Part = Annotated[float, "(0, 1)"]
Cosine = Annotated[float, "[-1, 1]"]
Count = Annotated[int, "[1, inf)"]

# Number of neighbors for computing densities, as in the authors' code for PruneVid, FlashVID, and HoliTom.
NEIGHBOURS = 7
BLOCK = 512  # number of rows of the pairwise distance matrix to keep in memory at a time
MAX_BLOCKS = 4  # maximum number of distance blocks to cache; if there are more, each block is computed twice
STEPS = 16384  # the tokens' root mean square length, in steps; distances are rounded to whole steps
MIN_RELEVANCE = 1 / 128  # scaled relevance of the least relevant token


def ranked(score: torch.Tensor) -> torch.Tensor:
    """Return the indices that sort `score` from highest to lowest: int64 `[n]`. Ties go to the lower index."""
    return score.argsort(descending=True, stable=True)


def relative(score: torch.Tensor) -> torch.Tensor:
    """Return the rounded logarithm of a nonnegative `score`.

    Because of the rounding, scores with a relative difference below 1/10,000 are considered ties.
    """
    return snap(score.log())


def scaled(score: torch.Tensor) -> torch.Tensor:
    """Scale `score` linearly to the range from 0 to 1. Returns zeros if all entries are equal."""
    low = score.min()
    high = score.max()
    return (score - low) / torch.where(high > low, high - low, torch.ones_like(high))


def closest(unit: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of `unit`, find the row of `others` with the highest cosine similarity.

    Args:
        unit: `[n, d]`, unit-length rows.
        others: `[m, d]`, one or more unit-length rows.

    Returns:
        float32 `[n]` cosines, and int64 `[n]` indices into `others`. Ties go to the lower index.
    """
    maxima = [snap(rows @ others.T).max(1) for rows in unit.split(BLOCK)]
    return torch.cat([piece.values for piece in maxima]), torch.cat([piece.indices for piece in maxima])


def apportion(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Divide `total` into integer shares in proportion to `weights` using the largest remainder method.

    Each share is limited by its entry in `most`. Any excess over a limit is distributed among the other shares, again in proportion
    to their weights, or evenly if all of these weights are zero. Ties go to the lower index. The shares add up to `total`, or to
    the sum of `most` if that is less. Weights must not be negative.
    """
    counts = [0] * len(most)
    quotas = {}
    open_ = [i for i, limit in enumerate(most) if limit > 0]
    while open_:
        left = total - sum(counts)
        parts = {i: Fraction(weights[i]) for i in open_}
        if not any(parts.values()):
            parts = dict.fromkeys(open_, Fraction(1))
        whole = sum(parts.values())
        quotas = {i: left * part / whole for i, part in parts.items()}
        full = [i for i in open_ if quotas[i] >= most[i]]
        if not full:
            break
        for i in full:
            counts[i] = most[i]
        open_ = [i for i in open_ if i not in full]
    for i in open_:
        counts[i] = math.floor(quotas[i])
    missing = total - sum(counts)
    for i in sorted(open_, key=lambda i: (counts[i] - quotas[i], i))[:missing]:
        counts[i] += 1
    return counts


def dissimilarity(tokens: Tokens) -> torch.Tensor:
    """Return how much each token differs from the token at the same position in the previous frame pair.

    The first frame pair is compared with the second one. With only one frame pair, all values are 0.

    Returns:
        float32 `[T, H * W]`, 1 minus the cosine similarity of the two tokens.
    """
    pairs = tokens.features.view(tokens.grid[0], -1, tokens.features.shape[1])
    later = 1 - snap(torch.cosine_similarity(pairs[1:].float(), pairs[:-1].float(), dim=-1))
    if len(later) == 0:
        return torch.zeros(pairs.shape[:2], dtype=torch.float32, device=pairs.device)
    return torch.cat([later[:1], later])


def transitions(tokens: Tokens) -> torch.Tensor:
    """Return the rounded cosine similarity between the mean tokens of each frame pair and the next: float32 `[T - 1]`."""
    mean = tokens.by_pair(tokens.features.float()).mean(1)
    return snap(torch.cosine_similarity(mean[1:], mean[:-1], dim=1))


def segments(similarity: torch.Tensor, least: int, threshold: float) -> list[range]:
    """Cut a video into segments, and return each segment's range of frame pairs.

    The video is cut at the `least - 1` lowest entries of `similarity` (`[T - 1]`), and wherever `similarity` is below `threshold`.
    """
    lowest = similarity.argsort(stable=True)[: max(0, least - 1)].tolist()
    below = (similarity < threshold).nonzero().flatten().tolist()
    edges = [0, *sorted(cut + 1 for cut in {*lowest, *below}), len(similarity) + 1]
    return [range(first, last) for first, last in pairwise(edges)]


def peaks(x: torch.Tensor, count: int, neighbours: int) -> torch.Tensor:
    """Return the indices of the rows of `x` (`[n, D]`) with the highest peak scores: int64 `[count]`, ascending."""
    if count == 0:
        return arange_on(0, x.device)
    return highest(peak_scores(x, neighbours), count)


def joined_peaks(x: torch.Tensor, count: int, neighbours: int | None = None) -> torch.Tensor:
    """Assign each row to its nearest density peak.

    Args:
        x: `[n, D]`, the rows.
        count: The number of peaks.
        neighbours: The number of neighbors for computing densities. The default, None, uses the number of peaks, but at least 2 and
            at most `NEIGHBOURS`. A row is its own first neighbor, so with a single neighbor all rows would be equally dense.

    Returns:
        int64 `[n]`, the index of the nearest peak. Peaks are assigned to themselves.
    """
    if neighbours is None:
        neighbours = min(NEIGHBOURS, max(2, count))
    centres = peaks(x, count, neighbours)
    points, _ = rounded_points(x)
    to = torch.cat([rounded_distances(block, points[centres]).argmin(1) for block in points.split(BLOCK)])
    return centres[to].index_copy(0, centres, centres)


def join_groups(
    into: torch.Tensor,
    features: torch.Tensor,
    groups: list[torch.Tensor],
    counts: list[int],
    centre: float | None = None,
) -> Selection:
    """Merge the tokens of each group around density peaks.

    Args:
        into: int64 `[N]`, the unit that each unit joins. Entries for units in `groups` must be -1 and are updated in place.
        features: float32 `[N, D]`, the units' features.
        groups: For each group, int64 `[m, g]`, the units that its m tokens consist of. Each token is the mean of g units.
        counts: The number of tokens to keep in each group. With 0, the group is dropped.
        centre: The minimum weight of a peak, as in `centre_weights`. None for equal weights.
    """
    weight = torch.ones_like(into, dtype=torch.float32)
    for group, count in zip(groups, counts, strict=True):
        if count:
            to = joined_peaks(features[group].mean(1), count)
            into[group] = group[to, :1].expand(group.shape)
            own = torch.ones_like(to, dtype=torch.float32) if centre is None else centre_weights(to, centre)
            weight[group] = (own / group.shape[1])[:, None].expand(group.shape)
    return gathered(into, weight)


def peak_scores(x: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Score how well each row serves as a density peak: float64 `[n]`, the log of its density times its distance to a denser row.

    The density is exp(-m), where m is the mean squared distance to the `neighbours` nearest rows, including the row itself, divided
    by D. The distance is measured to the nearest row with a higher density. For the densest row, it is the maximum of all
    distances. Among equally dense rows, the first is treated as denser. A constant term is omitted.

    This takes O(n^2 D) time and O(n D) memory.
    """
    points, step = rounded_points(x)
    index = arange_on(len(points), x.device)
    blocks = index.split(BLOCK)

    held = MAX_BLOCKS if len(blocks) <= MAX_BLOCKS else 0

    @lru_cache(held)
    def distances(number: int) -> torch.Tensor:
        return rounded_distances(points[blocks[number]], points)

    nearest = min(neighbours, len(points))
    near = [distances(number).topk(nearest, largest=False).values for number in range(len(blocks))]
    sparse = torch.cat([values.square().mean(1) for values in near])  # sums are exact, because distances are integers
    apart = torch.empty_like(sparse)
    farthest = sparse.new_zeros(())
    for number, block in enumerate(blocks):
        distance = distances(number)
        denser = (sparse < sparse[block, None]) | ((sparse == sparse[block, None]) & (index < block[:, None]))
        farthest = torch.maximum(farthest, distance.max())
        apart[block] = distance.masked_fill(~denser, torch.inf).amin(1)
    return snap(torch.minimum(apart, farthest).log() - sparse * step.square() / x.shape[1])


def rounded_points(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert the rows of `x` to integer multiples of a step. Returns float64 `[n, D]` and the step size."""
    x = x.double()
    step = x.square().sum(1).mean().sqrt().clamp(min=1e-30) / STEPS
    return x / step, step


def rounded_distances(block: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the distances between p and n points, rounded to whole steps: `[p, n]`."""
    return torch.cdist(block, points).round_()


def gathered(into: torch.Tensor, weight: torch.Tensor | None = None) -> Selection:
    """Create a selection, given the unit that each unit joins.

    Args:
        into: int64 `[N]`, the unit to join. Units that join themselves are kept, and units with -1 are dropped.
        weight: float32 `[N]`, each unit's weight in the mean. None for equal weights.
    """
    stays = into == arange_on(len(into), into.device)
    number = stays.cumsum(0) - 1
    return Selection(stays.nonzero().flatten(), torch.where(into < 0, -1, number[into]), weight)


def centre_weights(into: torch.Tensor, least: float) -> torch.Tensor:
    """Return each unit's weight in the mean that it joins: float32 `[N]`. For `into`, see `gathered`.

    A unit that n other units join has a weight of max(1 / (n + 1), `least`), and the n other units share the remaining weight
    evenly. A unit that no other units join has a weight of 1.
    """
    stays = into == arange_on(len(into), into.device)
    others = torch.bincount(into[(into >= 0) & ~stays], minlength=len(into))[into.clamp(min=0)]
    own = torch.where(others > 0, (1 / (others + 1).float()).clamp(min=least), 1.0)
    return torch.where(stays, own, (1 - own) / others.clamp(min=1))


def turns(order: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """For each token, count the tokens of the same group that precede it in `order`.

    Args:
        order: int64 `[n]`, the token indices in order.
        group: int64 `[n]`, each token's zero-based group index.

    Returns:
        int64 `[n]`, one count per token.
    """
    order = order[group[order].argsort(stable=True)]
    size = torch.bincount(group)
    before = (size.cumsum(0) - size)[group[order]]
    return torch.empty_like(order).index_copy_(0, order, arange_on(len(order), order.device) - before)


def averaged(
    index: torch.Tensor, spans: list[range], still: list[torch.Tensor], limit: float, keep: int
) -> torch.Tensor | None:
    """Average positions over time, starting with the most static position, until `keep` units are left.

    Each position is averaged over its whole segment, except the last one, which is averaged over only as many of the segment's
    first frame pairs as necessary.

    Args:
        index: int64 `[T, n]`, the unit indices.
        spans: The segments, as ranges of frame pairs.
        still: For each segment, `[n]`, how static each position is. Ties go to the lower index.
        limit: Only positions with a value above this are averaged.
        keep: The number of units to leave.

    Returns:
        int64 `[T, n]`, the unit that each unit joins, or None if more than `keep` units would be left.
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


def like_question(tokens: Tokens) -> torch.Tensor:
    """Return each token's mean cosine similarity to the question tokens, rounded so that equal tokens tie: float32 `[N]`."""
    return snap((tokens.normalised @ F.normalize(tokens.question, dim=1).T).mean(1))


def relevant(relevance: torch.Tensor) -> torch.Tensor:
    """Scale `relevance` (`[n]`) linearly to (0, 1]. If all entries are equal, they become 1."""
    flat = relevance.max() == relevance.min()
    return torch.where(flat, torch.ones_like(relevance), scaled(relevance).clamp(min=MIN_RELEVANCE))
