"""How much a pair of rows wants to be merged: EvoPrune's composite score (arXiv 2603.03681), in merge units.

    S_ij = s_ij - w_div * max(1 - d_i, 1 - d_j) - w_att * max(a_i, a_j)

s: cosine of the rows' features. d: local density, the mean cosine to the nearest rows of the group; a lone row has a low one and
is kept apart. a: attention received, relative to the group's most attended row. The paper names the three parts and their
purpose; their form for units and windows is this project's. Whose loneliness counts, that of either row (the maximum, as above), of
both (the mean) or of the one to be absorbed alone, is a choice.
"""

import torch
import torch.nn.functional as F

LONELY = ("either", "both", "absorbed")


def unit_features(x: torch.Tensor) -> torch.Tensor:
    """Keys (or queries) as one vector a row: mean over heads, the four patches joined.

    Args:
        x: `[R, 4, heads, d]`.

    Returns:
        float32 `[R, 4 * d]`.
    """
    return x.float().mean(2).flatten(1)


def similarity(features: torch.Tensor) -> torch.Tensor:
    """Cosines `[B, n, n]` of features `[B, n, D]`; a zero vector is similar to nothing."""
    unit = F.normalize(features.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def local_density(cosine: torch.Tensor, valid: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Mean cosine of each row to its `neighbours` nearest others in the group (fewer where there are fewer).

    Args:
        cosine: `[B, n, n]`.
        valid: bool `[B, n]`.

    Returns:
        `[B, n]`; 1 for a row that is alone.
    """
    n = cosine.shape[1]
    others = valid[:, None, :] & valid[:, :, None] & ~torch.eye(n, dtype=torch.bool)
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
    lonely: str = "either",
) -> torch.Tensor:
    """S `[B, n, n]` as above, the row to be absorbed first; a part whose weight is zero may be None. `lonely`: one of LONELY."""
    score = cosine
    if diversity_weight:
        lone = 1 - density
        one, other = lone[:, :, None], lone[:, None, :]
        counts = {"either": torch.maximum(one, other), "both": (one + other) / 2, "absorbed": one}[lonely]
        score = score - diversity_weight * counts
    if attention_weight:
        score = score - attention_weight * torch.maximum(attention[:, :, None], attention[:, None, :])
    return score


def settle(score: torch.Tensor) -> torch.Tensor:
    """Rounds scores to 1/16384, far below any difference that means something and far above rounding noise.

    Equal rows have cosines that differ in the last bits, and not the same way in batches of another size. Without this, such
    bits would decide between equals, and the answer would depend on the chunk size; so they are ties, which go by index.
    """
    return (score * 16384).round() / 16384
