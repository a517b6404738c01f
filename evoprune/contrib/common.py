"""What several methods share: ranks and means of tokens, segments of a video, and density peaks."""

from functools import lru_cache
from itertools import pairwise

import torch

from evoprune.methods.ranking import BLOCK, highest, snap
from evoprune.methods.types import Selection, Tokens, arange_on


def transitions(tokens: Tokens) -> torch.Tensor:
    """Return float32 `[T - 1]`: the cosine of the mean tokens of neighbouring frame pairs, rounded."""
    mean = tokens.by_pair(tokens.features.float()).mean(1)
    return snap(torch.cosine_similarity(mean[1:], mean[:-1], dim=1))


def segments(similarity: torch.Tensor, least: int, threshold: float) -> list[range]:
    """Return the frame pairs of each segment: cut at the `least - 1` lowest of `similarity` (`[T - 1]`), and below `threshold`."""
    lowest = similarity.argsort(stable=True)[: max(0, least - 1)].tolist()
    below = (similarity < threshold).nonzero().flatten().tolist()
    edges = [0, *sorted(cut + 1 for cut in {*lowest, *below}), len(similarity) + 1]
    return [range(first, last) for first, last in pairwise(edges)]


NEIGHBOURS = 7  # from which a density is computed, in the authors' code of PruneVid, FlashVID and HoliTom
MAX_BLOCKS = 4  # blocks of distances that are held; more are computed twice
FAR = 1 << 30  # steps that are more than any distance
STEPS = 16384  # distances are integers of this many steps of the tokens' root mean square length


def peaks(x: torch.Tensor, count: int, neighbours: int) -> torch.Tensor:
    """Return int64 `[count]`, ascending: the rows of `x` (`[n, D]`) with the highest peak scores."""
    if count == 0:
        return arange_on(0, x.device)
    return highest(peak_scores(x, neighbours), count)


def joined_peaks(x: torch.Tensor, count: int, neighbours: int | None = None) -> torch.Tensor:
    """Return int64 `[n]`: the nearest of the `count` peaks to each row of `x` (`[n, D]`); a peak joins itself.

    `neighbours`: None for as many as there are peaks, up to `NEIGHBOURS`; at least 2, as with one, itself, all would be as dense.
    """
    if neighbours is None:
        neighbours = min(NEIGHBOURS, max(2, count))
    centres = peaks(x, count, neighbours)
    points, _ = _points(x)
    to = torch.cat([_distances(block, points[centres]).argmin(1) for block in points.split(BLOCK)])
    return centres[to].index_copy(0, centres, centres)


def join_groups(
    into: torch.Tensor,
    features: torch.Tensor,
    groups: list[torch.Tensor],
    counts: list[int],
    centre: float | None = None,
) -> Selection:
    """Merges the tokens of each group around density peaks.

    Args:
        into: int64 `[N]`, the unit that each unit joins, -1 for the units of groups, which is changed.
        features: float32 `[N, D]`.
        groups: int64 `[m, g]` each: m tokens, each the mean of g units. `counts`: tokens to keep of each, 0 drops it.
        centre: the least weight of a peak, as in `centre_weights`; None for equal weights.
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
    """Return float64 `[n]`: the logarithm of density times distance to the nearest denser row; for the densest row, the greatest
    distance.

    Density is exp(-m), m the mean squared distance / D to the `neighbours` nearest rows, itself the first; a constant is left out.
    Of equally dense rows the first counts as denser. O(n^2 D), memory O(n D).
    """
    points, step = _points(x)
    index = arange_on(len(points), x.device)
    blocks = index.split(BLOCK)

    held = MAX_BLOCKS if len(blocks) <= MAX_BLOCKS else 0

    @lru_cache(held)
    def distances(number: int) -> torch.Tensor:
        return _distances(points[blocks[number]], points)

    nearest = min(neighbours, len(points))
    near = [distances(number).topk(nearest, largest=False).values for number in range(len(blocks))]
    sparse = torch.cat([values.square().mean(1) for values in near])  # exact: integers
    apart = torch.empty_like(sparse)
    farthest = sparse.new_zeros(())
    for number, block in enumerate(blocks):
        distance = distances(number)
        denser = (sparse < sparse[block, None]) | ((sparse == sparse[block, None]) & (index < block[:, None]))
        farthest = torch.maximum(farthest, distance.max())
        apart[block] = distance.masked_fill(~denser, torch.inf).amin(1)
    return snap(torch.minimum(apart, farthest).log() - sparse * step.square() / x.shape[1])


def vicinity_clusters(x: torch.Tensor, place: torch.Tensor, count: int, cutoff: float, near: float) -> torch.Tensor:
    """Return int64 `[n]`: the one of `count` centres whose cluster each row of `x` (`[n, D]`) is in (ViTCoP, arXiv 2601.17818).

    Each row follows the nearest of the denser rows whose `place` (`[n, 2]`) is at most `near` away, or else of all denser rows.
    What ends at a centre is its cluster. Centres are the rows of the greatest density times distance to the one they would follow.
    The density is the sum of exp(-d^2) over all rows, where d is a distance over `cutoff` times the root mean square distance of
    two rows. Of equally dense rows the first counts as denser. O(n^2 D), memory O(n D).
    """
    points = _points(x)[0]
    scale = cutoff * (2 * (points - points.mean(0)).square().sum(1).mean()).sqrt().clamp(min=1)
    index = arange_on(len(points), x.device)
    place = place.double()
    blocks = index.split(BLOCK)
    dense = snap(torch.cat([(-(_distances(points[block], points) / scale).square()).exp().sum(1) for block in blocks]))
    apart = torch.empty_like(dense)
    follows = torch.empty_like(index)
    for block in blocks:
        denser = (dense > dense[block, None]) | ((dense == dense[block, None]) & (index < block[:, None]))
        far = snap(torch.cdist(place[block], place) - near) > 0
        distance = (_distances(points[block], points) + far * FAR).masked_fill(~denser, torch.inf)
        apart[block], follows[block] = distance.min(1)
    centres = highest(snap(dense * apart / scale), count)
    follows[centres] = centres
    for _ in range(len(points).bit_length()):
        follows = follows[follows]
    return follows


def _points(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 `[n, D]`, the rows of `x` in steps; and the length of a step."""
    x = x.double()
    step = x.square().sum(1).mean().sqrt().clamp(min=1e-30) / STEPS
    return x / step, step


def _distances(block: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return `[p, n]`: distances in whole steps."""
    return torch.cdist(block, points).round_()


def relative(score: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of `score` (at least 0), rounded: scores that differ by less than a ten-thousandth of themselves are
    ties.
    """
    return snap(score.log())


def gathered(into: torch.Tensor, weight: torch.Tensor | None = None) -> Selection:
    """Return the selection in which each unit joins the unit `into` (int64 `[N]`); a unit stays if it joins itself, -1 drops it.

    `weight`, float32 `[N]`, is the weight of each unit in its mean; None for equal weights.
    """
    stays = into == arange_on(len(into), into.device)
    number = stays.cumsum(0) - 1
    return Selection(stays.nonzero().flatten(), torch.where(into < 0, -1, number[into]), weight)


def centre_weights(into: torch.Tensor, least: float) -> torch.Tensor:
    """Return float32 `[N]`: the weight of each unit in the mean that it joins; `into` as in `gathered`.

    A unit that n others join has weight max(1 / (n + 1), `least`), and the n share the rest evenly; alone it has weight 1.
    """
    stays = into == arange_on(len(into), into.device)
    others = torch.bincount(into[(into >= 0) & ~stays], minlength=len(into))[into.clamp(min=0)]
    own = torch.where(others > 0, (1 / (others + 1).float()).clamp(min=least), 1.0)
    return torch.where(stays, own, (1 - own) / others.clamp(min=1))


def turns(order: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return int64 `[n]`: how many of the same `group` (int64 `[n]`, from 0) come before each token in `order` (int64 `[n]`)."""
    order = order[group[order].argsort(stable=True)]
    size = torch.bincount(group)
    before = (size.cumsum(0) - size)[group[order]]
    return torch.empty_like(order).index_copy_(0, order, arange_on(len(order), order.device) - before)
