"""Attention of the language model: causal, with a bias for the cluster sizes of keys, of all columns or of some."""

import torch
import torch.nn.functional as F

from evoprune.backend.attention import causal_attention
from evoprune.methods.types import ascending

STRIP = 1024  # query columns that share one mask


def rows_at(x: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor | None:
    """Some rows of `x`; all where `rows` is None."""
    return x if x is None or rows is None else x[rows]


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    sees: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
    dim: int | None = None,
) -> torch.Tensor:
    """Causal attention of the last L columns, or of other columns: `[L, heads * head_dim]`.

    Args:
        queries: `[1, L, heads, head_dim]`; neighbouring heads share `keys` and `values`, `[1, kv_heads, n, head_dim]`. For one
            column these, and perhaps the queries, may have the features of a bias behind those of a head (`bias_features`).
        bias: `[n]`, added to the logits of each key: the logarithm of its cluster size makes a key weigh as much as that many
            equal keys (arXiv 2210.09461, section 3).
        sees: int64 `[L]`, ascending, how many keys each query sees, n the last; None for the last L columns.
        features: `[n, e]`, of the bias (`bias_features`), where a kernel is to take it that takes no mask.
        dim: head_dim, where the queries may have further features.
    """
    _, columns, heads, given = queries.shape
    (kv_heads, n, wide), dim = keys.shape[1:], dim or given
    if columns == 1:
        # Heads that share keys become columns of one head: keys are read once for all of them, two to four times as fast.
        queries, mask = queries.view(1, kv_heads, -1, given), None if bias is None else bias[None]
        if wide > dim:
            queries = F.pad(queries, (0, wide - given), value=1.0) if wide > given else queries
            seen = F.scaled_dot_product_attention(queries, keys, values, scale=dim**-0.5)
            return seen[..., :dim].reshape(1, -1)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).reshape(1, -1)
    # Key/value heads become the batch, so keys are not repeated and the kernel needs no support for groups.
    group = heads // kv_heads
    queries = queries.view(columns, kv_heads, group, dim).permute(1, 2, 0, 3)
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    if sees is None and (bias is None or features is not None):
        asks, *seen = (queries, keys, values) if bias is None else _with(features, queries, keys, values)
        seen = [t.expand(-1, group, -1, -1) for t in seen]
        out = causal_attention(asks, *seen, scale=None if bias is None else dim**-0.5)
        if out is not None:
            return out[..., :dim].permute(2, 0, 1, 3).reshape(columns, -1)
    keys, values = (t.expand(-1, group, -1, -1) for t in (keys, values))
    strips = []  # of queries, each with a mask: that of all would grow with the square of the prompt
    for start in range(0, columns, STRIP):
        strip = queries[:, :, start : start + STRIP]
        rows = strip.shape[2]
        if sees is None:
            end = n - columns + start + rows
            mask = torch.ones(rows, end, dtype=torch.bool, device=queries.device).tril(end - rows)
        else:
            end = n if start + rows == columns else int(sees[start + rows - 1])
            mask = ascending(end, queries.device) < sees[start : start + rows, None]
        if bias is not None:
            mask = bias[:end].expand(len(mask), -1).masked_fill(~mask, -torch.inf)
        strips.append(F.scaled_dot_product_attention(strip, keys[:, :, :end], values[:, :, :end], attn_mask=mask))
    return torch.cat(strips, 2).permute(2, 0, 1, 3).reshape(columns, -1)


def bias_features(bias: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """`[n, e]`: features behind those of keys, `dim`, whose product with ones is a bias on their scores, float32 `[n]`.

    A kernel that takes no mask takes them: heads may have up to 256 features, in multiples of eight. Scores are divided by the root
    of `dim`. The bias is the sum of two numbers, because one in bf16 would be off by up to 2^-9 of it.
    """
    value = (bias * dim**0.5).clamp(min=torch.finfo(dtype).min / 4)  # -inf times 0 would be NaN
    high = value.to(dtype)
    return F.pad(torch.stack([high, (value - high.float()).to(dtype)], -1), (0, -(dim + 2) % 8))


def _with(
    features: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads, `[kv_heads, g, columns, head_dim]`, with the features of a bias: keys have them, queries ones, values zeros."""
    more = features.shape[1]
    keys = torch.cat([keys, features.expand(*keys.shape[:2], -1, -1)], -1)
    return F.pad(queries, (0, more), value=1.0), keys, F.pad(values, (0, more))


def attend_blind(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    features: torch.Tensor | None,
    others: torch.Tensor,
    end: int,
) -> torch.Tensor:
    """As `attend`, but columns from `end` on attend to `others` (int64) only. The cache holds nothing but these columns."""
    before = max(0, queries.shape[1] - (keys.shape[2] - end))  # there may be queries of the last columns only
    extra = {"features": rows_at(features, others)}
    made = attend(queries[:, before:], keys[:, :, others], values[:, :, others], rows_at(bias, others), **extra)
    if not before:
        return made
    first, extra = (None if each is None else each[:end] for each in (bias, features))
    first = attend(queries[:, :before], keys[:, :, :end], values[:, :, :end], first, features=extra)
    return torch.cat([first, made])
