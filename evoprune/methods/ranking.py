"""Functions that rank tokens, and that score, match and merge pairs of rows, in strips of rows. Ties go by index everywhere."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from evoprune.backend.operators import BLOCK, snap
from evoprune.methods.types import Selection, arange_on, nonzero_fixed

MAX_SCORES = 1 << 22  # scores held at a time (16 MiB), or one row of each group if that is more
ALL = slice(None)


def ranked(score: torch.Tensor) -> torch.Tensor:
    """Return int64 `[n]`: indices of `score` (`[n]`) from the highest to the lowest; ties by index."""
    return score.argsort(descending=True, stable=True)


def highest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 `[count]`: indices of the `count` highest of `score` (`[n]`), ascending; ties to the lower index."""
    return ranked(score)[:count].sort().values


def scaled(score: torch.Tensor) -> torch.Tensor:
    """Return `score` scaled linearly to reach from 0 to 1; all 0 if it is the same everywhere."""
    low = score.min()
    high = score.max()
    return (score - low) / torch.where(high > low, high - low, torch.ones_like(high))


def closest(unit: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the greatest cosine of each row of `unit` (`[n, d]`) to one of `others` (`[m, d]`), float32 `[n]`; int64 `[n]`, whose.

    All rows are of length one, and m is at least 1. Ties go to the lower index.
    """
    maxima = [snap(rows @ others.T).max(1) for rows in unit.split(BLOCK)]
    return torch.cat([piece.values for piece in maxima]), torch.cat([piece.indices for piece in maxima])


def of_pairs(kept: Iterable[torch.Tensor], per_pair: int) -> Selection:
    """Return the selection of what each frame pair keeps: for each the places, int64, ascending, of its `per_pair`."""
    return Selection(torch.cat([places + pair * per_pair for pair, places in enumerate(kept)]))


def strips(groups: int, rows: int) -> list[slice]:
    """Return the strips of `groups` padded groups of `rows` rows whose scores `[groups, strip, rows]` are at most `MAX_SCORES`."""
    step = max(1, MAX_SCORES // max(1, groups * rows))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def unit_features(x: torch.Tensor) -> torch.Tensor:
    """Return float32 `[R, 4 * d]`: keys or queries (`[R, 4, heads, d]`) as the mean over heads, with the four patches joined."""
    return x.float().mean(2).flatten(1)


def similarity(features: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
    """Return the cosines `[B, m, n]` of the m `rows` of features `[B, n, D]` to all rows of their group; 0 for a zero vector."""
    unit = F.normalize(features.float(), dim=-1)
    return unit[:, rows] @ unit.transpose(1, 2)


def local_density(cosine: torch.Tensor, valid: torch.Tensor, neighbours: int, rows: slice = ALL) -> torch.Tensor:
    """Return `[B, m]`: the mean `cosine` (`[B, m, n]`) of the m `rows` to their nearest `valid` others (bool `[B, n]`).

    It is 1 for a row without others.
    """
    n = cosine.shape[2]
    index = arange_on(n, cosine.device)
    others = valid[:, None, :] & valid[:, rows, None] & (index[rows, None] != index)
    count = others.sum(-1).clamp(max=neighbours)
    nearest = cosine.masked_fill(~others, -torch.inf).topk(min(neighbours, n), dim=-1).values
    total = nearest.masked_fill(nearest.isinf(), 0).sum(-1)
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def relative_attention(received: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the attention received (`[B, n]`) divided by the highest of the group: `[B, n]` in [0, 1], 0 at padding."""
    top = received.masked_fill(~valid, 0).amax(1, keepdim=True)
    return torch.where(valid, received / top.clamp(min=1e-12), 0)


def composite_score(
    cosine: torch.Tensor,
    density: torch.Tensor | None,
    attention: torch.Tensor | None,
    diversity_weight: float,
    attention_weight: float,
    rows: slice = ALL,
) -> torch.Tensor:
    """Return `[B, m, n]`: EvoPrune's score of merging two rows (arXiv 2603.03681), with the row to be absorbed in dimension 1.

        S_ij = s_ij - w_div * max(1 - d_i, 1 - d_j) - w_att * max(a_i, a_j)

    s: `cosine` `[B, m, n]` of the m `rows`, from `similarity`; d: local density `[B, n]` (rows unlike all others should not merge);
    a: relative attention `[B, n]`. d and a are None if their weights are zero.
    """
    score = cosine
    if diversity_weight:
        unlike = 1 - density
        score = score - diversity_weight * torch.maximum(unlike[:, rows, None], unlike[:, None, :])
    if attention_weight:
        score = score - attention_weight * torch.maximum(attention[:, rows, None], attention[:, None, :])
    return score


def alternate(valid: torch.Tensor, first: int = 1) -> torch.Tensor:
    """Return the sources of a round, bool `[B, n]`: every second row of each group, from row `first` (0 or 1), may merge into
    another.
    """
    return (arange_on(valid.shape[1], valid.device) % 2 == first) & valid


def best_partners(
    score: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[B, m]`: the highest `score` (`[B, m, n]`) of each source (bool `[B, m]`) with a destination (bool `[B, n]`).

    It is -inf for other rows. And int64 `[B, m]`, the index of that destination. Ties go to the lower index.
    """
    allowed = source[:, :, None] & destination[:, None, :]
    return tuple(score.masked_fill(~allowed, -torch.inf).max(2))


def match(
    best: torch.Tensor, partner: torch.Tensor, source: torch.Tensor, last: torch.Tensor, remove: torch.Tensor
) -> torch.Tensor:
    """Return int64 `[B, n]`: the row that each row merges into, its own index if it stays. Sources of highest score merge first.

    `best`, `partner`: `[B, n]`, from `best_partners`, of all rows; `source`: bool `[B, n]`; `last`: bool `[B, n]`, critical rows,
    which merge only after all other sources; `remove`: int64 `[B]`, how many sources merge, all of them if there are fewer.
    """
    b, n = source.shape
    # The order: sources by score, then critical sources, then all other rows. The stable sorts give ties to the lower index.
    order = best.argsort(dim=1, descending=True, stable=True)
    late = (last & source).gather(1, order).to(torch.int8) + 2 * (~source).gather(1, order).to(torch.int8)
    order = order.gather(1, late.argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, arange_on(n, source.device).expand(b, n))
    goes = source & (rank < torch.minimum(remove, source.sum(1))[:, None])
    return torch.where(goes, partner, arange_on(n, source.device))


def merge_rows(x: torch.Tensor, size: torch.Tensor, into: torch.Tensor, rows: int, moves: int) -> torch.Tensor:
    """Return `[rows, ...]`, as `x`: the size-weighted mean, taken in float32, of each row that stays and those that merge into it.

    Args:
        x, size, into: `[R, ...]`; int64 `[R]`, cluster sizes; int64 `[R]`, the row that each row merges into, itself if it stays.
        rows: how many stay, or more: then the last rows are padding without meaning.
        moves: upper bound of the rows that merge.
    """
    goes = into != arange_on(len(into), into.device)
    stays = ~goes
    kept = nonzero_fixed(stays, rows)
    moved = nonzero_fixed(goes, moves)
    out = x[kept]
    before = size[kept]
    to = (stays.cumsum(0) - 1).clamp(max=rows - 1)[into[moved]]
    # Padding in `moved` weighs nothing.
    added = torch.where(arange_on(moves, into.device) < goes.sum(), size[moved], 0)
    after = before.index_add(0, to, added)
    # If several rows merge into one, one of their slots in `total` holds the sum. Any of them will do: all start from the same row.
    place = torch.empty_like(before).scatter_(0, to, arange_on(moves, into.device))[to]
    grown = (after > before)[to]  # other rows must stay exactly as they are
    column = (-1, *[1] * (x.ndim - 1))
    total = out[to].float().mul_(torch.where(grown, before[to], 1).view(column))
    total.index_add_(0, place, x[moved].float().mul_(added.view(column)))
    out[to] = total.div_(torch.where(grown, after[to], 1).view(column)).to(x.dtype)[place]
    return out
