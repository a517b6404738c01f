"""The score of merging two rows: EvoPrune's composite score (arXiv 2603.03681), on units; and the rounding of all scores.

    S_ij = s_ij - w_div * max(1 - d_i, 1 - d_j) - w_att * max(a_i, a_j)

s is the cosine of the rows' features, d the local density (a row unlike all others should not merge), a the attention received,
relative to the most attended row of the group. Scores are computed in strips of rows, because a group of n rows has n x n.
"""

import torch
import torch.nn.functional as F

from evoprune.pruning.indices import ascending

HELD = 1 << 22  # scores held at a time (16 MiB), or one row of each group if that is more
ALL = slice(None)


def strips(groups: int, rows: int) -> list[slice]:
    """The strips of `groups` padded groups of `rows` rows whose scores `[groups, strip, rows]` are at most `HELD`."""
    step = max(1, HELD // max(1, groups * rows))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def unit_features(x: torch.Tensor) -> torch.Tensor:
    """float32 `[R, 4 * d]`: keys or queries (`[R, 4, heads, d]`) as the mean over heads, with the four patches joined."""
    return x.float().mean(2).flatten(1)


def similarity(features: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
    """Cosines `[B, m, n]` of the m `rows` of features `[B, n, D]` to all rows of their group; 0 for a zero vector."""
    unit = F.normalize(features.float(), dim=-1)
    return unit[:, rows] @ unit.transpose(1, 2)


def local_density(cosine: torch.Tensor, valid: torch.Tensor, neighbours: int, rows: slice = ALL) -> torch.Tensor:
    """`[B, m]`: mean cosine of the m `rows` to their `neighbours` nearest other rows of the group; 1 for the only row of a group.

    Args:
        cosine: `[B, m, n]`, from `similarity`.
        valid: bool `[B, n]`.
    """
    n = cosine.shape[2]
    index = ascending(n, cosine.device)
    others = valid[:, None, :] & valid[:, rows, None] & (index[rows, None] != index)
    count = others.sum(-1).clamp(max=neighbours)
    nearest = cosine.masked_fill(~others, -torch.inf).topk(min(neighbours, n), dim=-1).values
    total = nearest.masked_fill(nearest.isinf(), 0).sum(-1)
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def relative_attention(received: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Attention received (`[B, n]`) divided by the highest of the group: `[B, n]` in [0, 1], 0 at padding."""
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
    """`[B, m, n]`: the score S, with the row to be absorbed in dimension 1.

    Args:
        cosine: `[B, m, n]`, of the m `rows`, from `similarity`.
        density, attention: `[B, n]`; None if its weight (w_div, w_att) is zero.
    """
    score = cosine
    if diversity_weight:
        unlike = 1 - density
        score = score - diversity_weight * torch.maximum(unlike[:, rows, None], unlike[:, None, :])
    if attention_weight:
        score = score - attention_weight * torch.maximum(attention[:, rows, None], attention[:, None, :])
    return score


def snap(score: torch.Tensor) -> torch.Tensor:
    """Rounds scores to multiples of 1/16384: far below any meaningful difference, and far above rounding noise.

    Cosines of equal rows differ in the last bits, and differently in batches of another size. Rounded, they are ties.
    """
    return (score * 16384).round() / 16384
