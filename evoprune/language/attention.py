"""Attention of language-model layers. There is one class for each case, and `attention_for` chooses it once per pass.

All classes compute attention from L query columns to n keys. They are called with:

    queries: `[1, L, heads, head_dim]`, where each head may end with bias features (see `Attention.bias_features`)
    keys, values: `[1, kv_heads, n, head_dim]`, where consecutive query heads share a key head and a value head

and return the output, `[L, heads * head_dim]`. A bias is a tensor `[n]`, which is added to each key's attention scores. With a bias
of log(cluster size), a key has the same effect as that many identical keys (arXiv 2210.09461, section 3).
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from evoprune.backend import Attention, Device, Quantization
from evoprune.methods import arange_on

STRIP = 1024  # number of query columns that share an attention mask


class Attend(Protocol):
    """Attention in one layer."""

    features: int  # number of bias features that queries may have; 0 means as many as the keys
    is_causal: bool  # whether the queries are the last L columns, and each attends to all columns up to itself

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor: ...


def attention_for(
    columns: int, dim: int, device: torch.device, bias: torch.Tensor | None = None, wide: torch.Tensor | None = None
) -> Attend:
    """Return the causal attention for the last columns.

    Args:
        columns: Number of query columns (L).
        dim: The head size without bias features.
        bias: See above. None means no bias.
        wide: A buffer from `Attention.room_for_bias`, or None to apply the bias as a mask.
    """
    if columns == 1:
        return OneColumn(dim, bias)
    if columns <= Quantization.few_rows and Device(device).reads_drafts:
        return FewColumns(dim, bias)
    if bias is None:
        return Plain()
    return Biased(dim, bias, wide)


class OneColumn:
    """Attention from a single column to all keys."""

    features = 0
    is_causal = True

    def __init__(self, dim: int, bias: torch.Tensor | None = None):
        self._dim = dim
        self._bias = None if bias is None else bias[None]

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        given = queries.shape[3]
        kv_heads, _, whole = keys.shape[1:]
        # Treat query heads with shared keys as columns of a single head, so the keys are read only once. This is two to four times
        # as fast.
        queries = queries.view(1, kv_heads, -1, given)
        if whole > given:
            queries = F.pad(queries, (0, whole - given), value=1.0)
        if whole > self._dim:  # the keys have bias features
            seen = F.scaled_dot_product_attention(queries, keys, values, scale=self._dim**-0.5)
            return seen[..., : self._dim].reshape(1, -1)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._bias).reshape(1, -1)


class FewColumns:
    """Attention from a few columns, one by one, so that a column's result doesn't depend on the others."""

    features = 0
    is_causal = True

    def __init__(self, dim: int, bias: torch.Tensor | None = None):
        self._dim = dim
        self._bias = bias

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        n = keys.shape[2]
        seen = []
        for query, end in zip(queries.split(1, 1), range(n - queries.shape[1] + 1, n + 1), strict=True):
            single = OneColumn(self._dim, None if self._bias is None else self._bias[:end])
            seen.append(single(query, keys[:, :, :end], values[:, :, :end]))
        return torch.cat(seen)


class Plain:
    """Causal attention without a bias."""

    features = 0
    is_causal = True

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        grouped = _grouped(queries, keys, values)
        out = Attention.of(queries).causal(*grouped, scale=None)
        if out is None:
            out = _in_strips(*grouped, None, _causal_mask(queries.shape[1], keys.shape[2], queries.device))
        return _columns_first(out)


class Biased:
    """Causal attention with a bias, which is applied through `wide` if possible, and otherwise as a mask."""

    is_causal = True

    def __init__(self, dim: int, bias: torch.Tensor, wide: torch.Tensor | None):
        self._dim = dim
        self._bias = bias
        self._wide = wide
        self.features = 0 if wide is None else wide.shape[3] - dim

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        dim = self._dim
        if self._wide is not None and (out := self._with_features(queries, keys, values)) is not None:
            return _columns_first(out[..., :dim])
        queries, keys, values = _grouped(queries, keys, values)
        mask = _causal_mask(queries.shape[2], keys.shape[2], queries.device)
        return _columns_first(_in_strips(queries[..., :dim], keys, values, self._bias, mask))

    def _with_features(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
        """Compute attention with a kernel that doesn't support masks, or return None if there is no such kernel."""
        wide, dim = self._wide, self._dim
        for room, tensor in zip(wide[..., :dim], (keys, values), strict=True):
            room.copy_(tensor[0])
        if wide.shape[3] > queries.shape[3]:
            queries = F.pad(queries, (0, wide.shape[3] - queries.shape[3]), value=1.0)
        grouped = _grouped(queries, *wide[:, None])
        return Attention.of(queries).causal(*grouped, scale=dim**-0.5)


class Restricted:
    """Attention from some columns to some of the columns up to themselves.

    Args:
        visible_keys: int64 `[L]`, the number of keys that each query can attend to, in ascending order. The last number must be n.
    """

    features = 0
    is_causal = False

    def __init__(self, dim: int, bias: torch.Tensor | None, visible_keys: torch.Tensor):
        self._dim = dim
        self._bias = bias
        self._visible_keys = visible_keys

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        columns, n = queries.shape[1], keys.shape[2]
        if columns == 1:
            return OneColumn(self._dim, self._bias)(queries, keys, values)

        def mask(start: int, end: int) -> torch.Tensor:
            visible = self._visible_keys[start:end]
            most = n if end == columns else int(visible[-1])
            return arange_on(most, queries.device) < visible[:, None]

        return _columns_first(_in_strips(*_grouped(queries, keys, values), self._bias, mask))


class Blind:
    """Causal attention, except that columns starting at `end` attend only to the columns in `others` (int64).

    `keys` must include all prompt columns. If there are fewer queries than keys, the queries correspond to the last columns.
    """

    features = 0
    is_causal = False

    def __init__(self, dim: int, bias: torch.Tensor | None, wide: torch.Tensor | None, others: torch.Tensor, end: int):
        self._dim = dim
        self._bias = bias
        self._wide = wide
        self._others = others
        self._end = end

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        before = max(0, queries.shape[1] - (keys.shape[2] - self._end))  # number of queries before `end`
        sighted = self._attend(queries[:, before:], keys, values, self._others)
        if not before:
            return sighted
        return torch.cat([self._attend(queries[:, :before], keys, values, slice(self._end)), sighted])

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | slice
    ) -> torch.Tensor:
        bias = None if self._bias is None else self._bias[visible]
        wide = None if self._wide is None else self._wide[:, :, visible]
        attend = attention_for(queries.shape[1], self._dim, queries.device, bias, wide)
        return attend(queries, keys[:, :, visible], values[:, :, visible])


def additive_mask(
    columns: int, before: int, like: torch.Tensor, sizes: torch.Tensor | None = None, window: int | None = None
) -> torch.Tensor:
    """Return a causal mask with cluster sizes for all layers, `[1, 1, columns, before + columns]`, as transformers takes it.

    Args:
        columns: Number of new columns.
        before: Number of columns before them.
        like: A tensor with the dtype and device of the attention scores.
        sizes: float32 `[n]`, the cluster sizes of all columns, and possibly of later ones. None means that all sizes are 1, and the
            mask is boolean.
        window: Number of columns that each new column attends to, including itself, or None for all columns.
    """
    end = before + columns
    keys, queries = arange_on(end, like.device), arange_on(columns, like.device)[:, None] + before
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    if sizes is not None:
        mask = torch.where(mask, sizes[:end].log().to(like.dtype), -torch.inf)
    return mask[None, None]


def _grouped(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Use the key/value heads as the batch dimension, so that keys aren't repeated and kernels needn't support grouped heads.

    Returns:
        The queries, `[kv_heads, group, L, dim]`, and the keys and values, `[kv_heads, group, n, dim]`.
    """
    _, columns, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    queries = queries.view(columns, kv_heads, group, dim).permute(1, 2, 0, 3)
    return queries, *(tensor.transpose(0, 1).expand(-1, group, -1, -1) for tensor in (keys, values))


def _columns_first(out: torch.Tensor) -> torch.Tensor:
    """Convert the output of grouped heads, `[kv_heads, group, L, dim]`, to `[L, heads * dim]`."""
    return out.permute(2, 0, 1, 3).reshape(out.shape[2], -1)


def _causal_mask(columns: int, n: int, device: torch.device) -> Callable[[int, int], torch.Tensor]:
    def mask(start: int, end: int) -> torch.Tensor:
        most = n - columns + end
        return torch.ones(end - start, most, dtype=torch.bool, device=device).tril(most - (end - start))

    return mask


def _in_strips(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    mask_of: Callable[[int, int], torch.Tensor],
) -> torch.Tensor:
    """Compute masked attention in strips of queries, because a single mask would grow quadratically with the prompt length.

    Args:
        queries, keys, values: See `_grouped`.
        mask_of: Returns a mask for a range of queries, bool `[queries, m]`, which is True at visible keys. The last n - m keys are
            hidden from all of these queries.
    """
    columns = queries.shape[2]
    strips = []
    for start in range(0, columns, STRIP):
        end = min(start + STRIP, columns)
        mask = mask_of(start, end)
        most = mask.shape[1]
        if bias is not None:
            mask = bias[:most].expand(len(mask), -1).masked_fill(~mask, -torch.inf)
        strip = queries[:, :, start:end]
        strips.append(F.scaled_dot_product_attention(strip, keys[:, :, :most], values[:, :, :most], attn_mask=mask))
    return torch.cat(strips, 2)
