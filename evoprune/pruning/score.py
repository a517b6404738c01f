"""How much a pair of rows wants to be merged: EvoPrune's composite score (arXiv 2603.03681), in merge units.

    S_ij = s_ij - w_div * max(1 - d_i, 1 - d_j) - w_att * max(a_i, a_j)

s: cosine of the rows' features. d: local density, the mean cosine to the nearest rows of the group; a lone row has a low one and
is kept apart. a: attention received, relative to the group's most attended row. The paper names the three parts and their
purpose; their form for units and windows is this project's.

A group of n rows has n x n scores, which for large grids would be more than all else. So they are made in strips of rows, each
strip only for as long as it takes to find the best of every row.
"""

import torch
import torch.nn.functional as F

HELD = 1 << 22  # scores that are held at a time, but for a single row of each group: 16 MiB
ALL = slice(None)


def strips(groups: int, rows: int) -> list[slice]:
    """All rows of groups that lie side by side, in pieces of which the scores `[groups, piece, rows]` are few enough to be held."""
    step = max(1, HELD // max(1, groups * rows))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def unit_features(x: torch.Tensor) -> torch.Tensor:
    """Keys (or queries) as one vector a row: mean over heads, the four patches joined.

    Args:
        x: `[R, 4, heads, d]`.

    Returns:
        float32 `[R, 4 * d]`.
    """
    return x.float().mean(2).flatten(1)


def similarity(features: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
    """Cosines `[B, m, n]` of m `rows` of features `[B, n, D]` to all of their group; a zero vector is similar to nothing."""
    unit = F.normalize(features.float(), dim=-1)
    return unit[:, rows] @ unit.transpose(1, 2)


def local_density(cosine: torch.Tensor, valid: torch.Tensor, neighbours: int, rows: slice = ALL) -> torch.Tensor:
    """Mean cosine of each row to its `neighbours` nearest others in the group (fewer where there are fewer).

    Args:
        cosine: `[B, m, n]`, of m `rows`.
        valid: bool `[B, n]`.

    Returns:
        `[B, m]`; 1 for a row that is alone.
    """
    n = cosine.shape[2]
    index = torch.arange(n)
    others = valid[:, None, :] & valid[:, rows, None] & (index[rows, None] != index)
    count = others.sum(-1).clamp(max=neighbours)
    nearest = cosine.masked_fill(~others, -torch.inf).topk(min(neighbours, n), dim=-1).values
    total = nearest.masked_fill(nearest.isinf(), 0).sum(-1)
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def relative_attention(received: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Attention received as a share of the group's highest: `[B, n]` in [0, 1]."""
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
    """S as above, the row to be absorbed first.

    Args:
        cosine: `[B, m, n]`, of m `rows`.
        density, attention: `[B, n]`; None if its weight is zero.

    Returns:
        `[B, m, n]`.
    """
    score = cosine
    if diversity_weight:
        lone = 1 - density
        score = score - diversity_weight * torch.maximum(lone[:, rows, None], lone[:, None, :])
    if attention_weight:
        score = score - attention_weight * torch.maximum(attention[:, rows, None], attention[:, None, :])
    return score


def snap(score: torch.Tensor) -> torch.Tensor:
    """Rounds scores to 1/16384, far below any difference that means something and far above rounding noise.

    Equal rows have cosines that differ in the last bits, and not the same way in batches of another size. Without this, such
    bits would decide between equals, and the answer would depend on the chunk size; so they are ties, which go by index.
    """
    return (score * 16384).round() / 16384
