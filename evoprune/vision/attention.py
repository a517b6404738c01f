"""Attention of rows inside their groups (windows or frame pairs).

Groups of similar length share a *bucket*: they are padded to a common length, and a mask covers the padding. Equal groups of
neighbouring rows need no padding, so their bucket is a view without gather or mask. On a CPU, `buckets` sorts the groups by
their lengths. On a GPU, reading the lengths would synchronise. There `Packed` holds all groups for a kernel that reads the
lengths on the device; without one, `static_bucket` pads them to the greatest possible length. `plan_attention` chooses.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from evoprune.backend import devices
from evoprune.backend.attention import NEVER, attends_by_products, varlen_kernel
from evoprune.methods.types import arange_on, cat, runs
from evoprune.model.config import PATCHES
from evoprune.model.numerics import without_autocast
from evoprune.vision.layout import Groups, Scope, TokenLayout, attention_groups, order_tables


@dataclass(frozen=True)
class Bucket:
    """A batch of B groups, with Q query rows and K key rows each."""

    shape: tuple[int, int]  # (B, Q)
    # int64 `[B, Q]` rows, or neighbouring ones in order, or None where the bucket is all rows in order
    query: torch.Tensor | slice | None = None
    key: torch.Tensor | None = None  # int64 `[B, K]` rows, or None where the keys are the queries
    # int64 or bool `[B, K]`, how much each key weighs, 0 at padding; None where all weigh the same
    weight: torch.Tensor | None = None
    inside: torch.Tensor | None = None  # bool `[B, Q]`, False at padding; None without padding, and with `back`
    # int64 `[R]`, twice: the group of each row, and its number in it; None where `query` and `inside` say it
    back: tuple[torch.Tensor, torch.Tensor] | None = None
    layout: TokenLayout | None = None  # of all rows, if keys may be of other frame pairs than their group

    def parts(self, rows: int) -> Iterator["Bucket"]:
        """Yields the bucket in parts of whole groups, of at most so many query or key rows, or of one group."""
        groups, longest = self.shape
        at_once = max(1, rows // max(longest, 0 if self.key is None else self.key.shape[1]))
        if at_once >= groups:
            yield self
            return
        for first in range(0, groups, at_once):
            of = slice(first, min(first + at_once, groups))
            query = slice(of.start * longest, of.stop * longest) if self.query is None else self.query[of]
            key, weight, inside = (x if x is None else x[of] for x in (self.key, self.weight, self.valid))
            yield Bucket((of.stop - of.start, longest), query, key, weight, inside, layout=self.layout)

    def by_head(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """Rows of `x` `[R, 4, heads, d]` as `[B, heads, Q*4 or K*4, d]`; `which`: "query" or "key"."""
        index = self.key if which == "key" and self.key is not None else self.query
        rows = x if index is None else x[index]
        return rows.reshape(self.shape[0], -1, *x.shape[2:]).transpose(1, 2)

    @cached_property
    def valid(self) -> torch.Tensor | None:
        """bool `[B, Q]`, which queries are no padding; None for all."""
        if self.back is None:
            return self.inside
        row = torch.ones_like(self.back[0], dtype=torch.bool)
        return row.new_zeros(self.shape).index_put_(self.back, row)

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """What is added to the scores of each key patch, float32 `[B, 1, 1, K*4]`: the log of its weight. None for 0."""
        if self.weight is None:
            return None
        return self.weight.float().log().repeat_interleave(PATCHES, dim=1)[:, None, None]


@dataclass(frozen=True)
class Packed:
    """All groups of a layout, for a device whose values the CPU does not read. Arguments as of `plan_attention`."""

    layout: TokenLayout
    scope: Scope
    size_bias: bool
    kernel: Callable  # `varlen_kernel`

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of all groups in one call of the kernel; arguments `[patches, heads, d]`, keys group after group."""
        longest = longest_key = self.layout.longest(self.scope)
        if self.layout.mixes(self.scope):
            longest_key = self.layout.group_units(self.scope)[0].shape[1]
        return self.kernel(q, k, v, *self.ends, longest * PATCHES, longest_key * PATCHES, scale=scale)

    @cached_property
    def keys(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """int64 `[K]`, key rows, group after group, None for all in order; int64 `[K]`, how much each weighs, None for evenly."""
        layout = self.layout
        if not layout.mixes(self.scope):
            return None, layout.size if self.size_bias else None
        if self.size_bias and layout.complete:
            return layout.unit_to_row[order_tables(layout.geometry, layout.pairs)[0]], None
        used = layout.group_units(self.scope)[1]
        key, weight = (x.flatten()[used] for x in keys_of_units(layout, self.scope, self.size_bias))
        return key.clamp(min=0), weight.long()

    @cached_property
    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two int32 `[G + 1]`, each a zero and the ends of all groups: counted in query patches, and in key patches."""
        query = (self.layout.row_groups(self.scope)[1] * PATCHES).int()
        return query, self.layout.group_units(self.scope)[2] if self.layout.mixes(self.scope) else query


AttentionPlan = list[Bucket] | Packed


def plan_attention(layout: TokenLayout, scope: Scope, like: torch.Tensor, size_bias: bool) -> AttentionPlan:
    """Return how the rows of a layout attend inside their groups of `scope`, by the device and the dtype of `like`.

    `size_bias` adds to the scores of a key the log of its cluster size inside the group (proportional attention: ToMe, arXiv
    2210.09461, section 3).
    """
    if devices.exact_shapes(like.device):
        return buckets(attention_groups(layout, scope), size_bias, layout)
    kernel = varlen_kernel(like.device, like.dtype)
    return Packed(layout, scope, size_bias, kernel) if kernel else [static_bucket(layout, scope, size_bias)]


def keys_of_units(layout: TokenLayout, scope: Scope, size_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys of groups without reading values, `[G, K]`: int64, the row of each of a group's units; and bool, which count.

    A row of several units of a group is as many keys, which weigh together what `size_bias` says; without it one counts.
    """
    key = F.pad(layout.unit_to_row, (0, 1), value=-1)[layout.group_units(scope)[0]]
    if size_bias:
        return key, key >= 0
    key = key.sort(1, descending=True).values
    return key, F.pad(key[:, 1:] != key[:, :-1], (1, 0), value=True) & (key >= 0)


def static_bucket(layout: TokenLayout, scope: Scope, size_bias: bool) -> Bucket:
    """Return all groups, padded to the greatest length that a group can have."""
    geo = layout.geometry
    longest = layout.longest(scope)
    total = layout.group_count(scope)
    full = scope == "pair" or geo.windows * geo.largest_window == geo.units  # groups have equally many units
    even = layout.counts is not None and min(layout.counts) == longest if scope == "pair" else layout.reach == "place"
    if full and even and not layout.mixes(scope):
        return Bucket((total, longest), weight=layout.size.view(total, longest) if size_bias else None)
    group, bounds = layout.row_groups(scope)
    query = (bounds[:-1, None] + arange_on(longest, bounds.device)).clamp(max=layout.rows - 1)
    back = group, (arange_on(layout.rows, group.device) - bounds[group]).clamp(max=longest - 1)
    bucket = Bucket((total, longest), query, back=back, layout=layout if layout.reach == "clip" else None)
    if not layout.mixes(scope):
        return replace(bucket, weight=torch.where(bucket.valid, layout.size[query], 0) if size_bias else bucket.valid)
    if size_bias and layout.complete and full:
        return replace(bucket, key=layout.unit_to_row[layout.group_units(scope)[0]])
    key, weight = keys_of_units(layout, scope, size_bias)
    return replace(bucket, key=key, weight=weight)


def _padded(groups: Groups, members: torch.Tensor, size_bias: bool, layout: TokenLayout) -> Bucket:
    """Return the bucket of some groups (int64 `[B]`), padded to the longest of them."""
    longest, longest_key = (int(lengths[members].max()) for lengths in (groups.length, groups.key_length))
    start = groups.key_length.cumsum(0) - groups.key_length
    query, valid = runs(groups.start[members], groups.length[members], longest, layout.rows)
    key, key_valid = runs(start[members], groups.key_length[members], longest_key, len(groups.keys))
    weight = torch.where(key_valid, groups.count[key], 0) if size_bias else None if key_valid.all() else key_valid
    clip = layout if layout.reach == "clip" else None
    key = None if groups.consecutive else groups.keys[key]
    return Bucket(tuple(query.shape), query, key, weight, None if valid.all() else valid, layout=clip)


def buckets(groups: Groups, size_bias: bool, layout: TokenLayout) -> list[Bucket]:
    """Sorts groups into buckets of similar length.

    Up to four different numbers of keys get a bucket each; more are put together where they differ by less than a quarter. Where
    queries and keys are not the same rows, a bucket is divided again: its numbers of queries differ by less than a half. So a group
    with one new row is not padded to a full group.
    """
    lengths = groups.key_length.unique()
    if groups.consecutive and len(lengths) == 1:
        shape = (len(groups.length), int(lengths))
        return [Bucket(shape, weight=groups.count.view(shape) if size_bias else None)]
    padded = []
    for like in _alike(groups.key_length, 0.75 if len(lengths) > 4 else 1.0):
        batches = [like] if groups.consecutive else [like[subset] for subset in _alike(groups.length[like], 0.5)]
        padded += [_padded(groups, members, size_bias, layout) for members in batches]
    return padded


def _alike(length: torch.Tensor, share: float) -> Iterator[torch.Tensor]:
    """Divides groups by `length` (int64 `[G]`), longest first: each time the indices of all above `share` of the longest left."""
    left = length.unique().tolist()[::-1]
    while left:
        below = [n for n in left[1:] if n <= share * left[0]]
        yield ((length <= left[0]) & (length > (below[0] if below else 0))).nonzero().flatten()
        left = below


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    received: torch.Tensor | None = None,
    timer: devices.Timer | None = None,
    at_once: int | None = None,
) -> torch.Tensor:
    """Softmax attention of every row to the key rows of its group, `[R, 4, heads, d]`.

    Args:
        q, k, v: `[R, 4, heads, d]`, after rotary.
        received: float32 `[R]`, to which the attention is added that each row receives: the mean over heads and over the queries of
            a group, summed over the row's 4 patches. Queries of other frame pairs are left out. `timer` measures the time for it.
        at_once: rows of groups that attend at a time, except in a kernel, which bounds the memory; None for all.
    """
    timer = timer or nullcontext()
    if isinstance(plan, Packed):
        if received is not None:
            with timer:
                received += attention_received(q, k, plan, at_once)
        return attend_packed(q, k, v, plan)
    out = None
    for bucket in plan:
        parts = list(bucket.parts(at_once or len(k)))
        if bucket.back is not None:
            answers = [_attend_bucket(q, k, v, part, received, timer) for part in parts]
            return cat(answers)[bucket.back]
        for part in parts:
            answer = _attend_bucket(q, k, v, part, received, timer)
            if part.query is None:
                return answer.reshape(q.shape)
            out = torch.empty_like(q) if out is None else out
            if isinstance(part.query, slice):
                out[part.query] = answer.flatten(0, 1)
            else:
                valid = ... if part.valid is None else part.valid
                out[part.query[valid]] = answer[valid]
    return out


def _attend_bucket(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bucket: Bucket,
    received: torch.Tensor | None,
    timer: AbstractContextManager,
) -> torch.Tensor:
    """Attention of one bucket, `[B, Q, 4, heads, d]`; arguments as in `grouped_attention`."""
    query, key, value = (bucket.by_head(x, which) for x, which in ((q, "query"), (k, "key"), (v, "key")))
    bias = None if bucket.bias is None else bucket.bias.to(q.dtype)
    per_key = None
    if attends_by_products(q, key.shape[2]):
        weight = None
        if received is not None:
            with timer:
                weight = query_weight(bucket, q)
        answer, per_key = attend_by_products(query, key, value, bias, weight, timer)
    else:
        answer = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    if received is not None:
        with timer:
            if per_key is None:
                per_key = received_by_keys(query, key, bucket)
            add_by_row(received, per_key, bucket)
    return answer.unflatten(2, (-1, PATCHES)).permute(0, 2, 3, 1, 4)


def attend_by_products(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    timer: AbstractContextManager,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention `[B, heads, Q, d]` as two matrix products; and the attention received, float32 `[B, K]`, or None.

    For bf16 on a CPU it takes half the time of the fused kernel, if the scores stay in the cache. `k`, `v`: `[B, heads, K, d]`;
    `bias`: `[B, 1, 1, K]`; `weight`: float32 `[B, Q]`, of each query in the attention received, which `timer` measures.
    """
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    q, k, v = (x.reshape(batch * heads, -1, dim) for x in (q, k, v))
    if bias is not None:
        bias = bias.expand(-1, heads, 1, -1).reshape(batch * heads, 1, keys)
    out = torch.empty_like(q)
    received = None
    if weight is not None:
        with timer:
            received = torch.zeros(batch * heads, keys, dtype=torch.float32, device=q.device)
            weight = weight.repeat_interleave(heads, 0)[:, :, None]
    held = devices.scores_at_a_time(q.device)
    rows = max(1, min(queries, held // keys))
    groups = max(1, min(len(q), held // (rows * keys)))
    for g in range(0, len(q), groups):
        of = slice(g, g + groups)
        added, beta = (q.new_empty(1), 0) if bias is None else (bias[of], 1)
        for at in range(0, queries, rows):
            piece = slice(at, at + rows)
            scores = torch.baddbmm(added, q[of, piece], k[of].transpose(1, 2), beta=beta, alpha=dim**-0.5).softmax(-1)
            out[of, piece] = torch.bmm(scores, v[of])
            if received is not None:
                with timer:
                    received[of] += (scores * weight[of, piece]).sum(1)
    out = out.view(batch, heads, queries, dim)
    return out, None if received is None else received.view(batch, heads, keys).sum(1)


def attention_received(
    q: torch.Tensor, k: torch.Tensor, plan: AttentionPlan, at_once: int | None = None
) -> torch.Tensor:
    """float32, like the rows of `k`: as `received` of `grouped_attention`, without the output of the attention."""
    total = torch.zeros(len(k), dtype=torch.float32, device=k.device)
    for bucket in [static_bucket(plan.layout, plan.scope, plan.size_bias)] if isinstance(plan, Packed) else plan:
        for part in bucket.parts(at_once or len(k)):
            per_key = received_by_keys(part.by_head(q, "query"), part.by_head(k, "key"), part)
            add_by_row(total, per_key, part)
    return total


@without_autocast()
def received_by_keys(queries: torch.Tensor, keys: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """Return the attention that each key patch of a bucket receives, float32 `[B, K*4]`, from `queries` and `keys` by head."""
    batch, heads, _, dim = queries.shape
    weight = query_weight(bucket, queries.transpose(1, 2))
    total = torch.zeros(batch, keys.shape[2], dtype=torch.float32, device=keys.device)
    step = max(1, devices.scores_at_a_time(queries.device) // (batch * heads * keys.shape[2]))
    for at in range(0, queries.shape[2], step):
        scores = (queries[:, :, at : at + step] * dim**-0.5) @ keys.transpose(2, 3)
        probs = (scores.float() if bucket.bias is None else scores.float() + bucket.bias).softmax(-1)
        total += torch.einsum("bhqk,bq->bk", probs, weight[:, at : at + step])
    return total


def query_weight(bucket: Bucket, q: torch.Tensor) -> torch.Tensor:
    """float32 `[B, Q*4]`: the weight of each query (`q`: `[..., heads, d]`) in the mean over heads and queries of its group."""
    valid = q.new_ones(bucket.shape, dtype=torch.float32) if bucket.valid is None else bucket.valid.float()
    return (valid / valid.sum(1, keepdim=True).clamp(min=1) / PATCHES / q.shape[-2]).repeat_interleave(PATCHES, dim=1)


def add_by_row(received: torch.Tensor, per_key: torch.Tensor, bucket: Bucket) -> None:
    """Adds what the key patches of a bucket receive (`per_key`, float32 `[B, K*4]`) to their rows in `received`, float32 `[R]`."""
    per_row = per_key.view(len(per_key), -1, PATCHES).sum(2)
    index = bucket.key if bucket.key is not None else bucket.query
    if index is None or isinstance(index, slice):
        received[index or slice(None)] += per_row.flatten()
        return
    if bucket.layout is not None:  # keys of other frame pairs receive nothing
        pair = bucket.layout.pair_of_row
        per_row = torch.where(pair[index] == pair[bucket.query[:, :1]], per_row, 0)
    if bucket.weight is not None:
        per_row = torch.where(bucket.weight > 0, per_row, 0)
    received.index_add_(0, index.clamp(min=0).flatten(), per_row.flatten())


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Packed) -> torch.Tensor:
    """Attention of all groups by a kernel that reads their lengths on the GPU; it takes neither mask nor bias."""
    dim = q.shape[-1]
    (keys, weight), key, value = plan.keys, k, v
    if keys is not None:
        key = k[keys]
        value = v[keys]
    if weight is not None:
        q, key, value = with_bias(q, key, value, weight)
    answer = plan.attend(*(x.flatten(0, 1) for x in (q, key, value)), scale=dim**-0.5)
    return answer[..., :dim].unflatten(0, (-1, PATCHES))


def with_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Carries the log of `weight` (int64 `[K]`) in extra head dimensions: q' = [q, 1, 1, 0 ...], k' = [k, high, low, 0 ...].

    The kernel scales all products by 1 / sqrt(d), so the log is multiplied by sqrt(d) here. It is the sum of two numbers, because
    one bf16 number would be off by up to 2^-9 of it. A weight of 0 is one of e^-`NEVER`. Zeros fill up to a multiple of eight
    dimensions, which kernels need.
    """
    dim = q.shape[-1]
    extra = -(dim + 2) % 8 + 2
    value = weight.float().log().clamp(min=-NEVER) * dim**0.5
    high = value.to(k.dtype)
    low = (value - high.float()).to(k.dtype)
    more = F.pad(torch.stack([high, low], -1), (0, extra - 2))[:, None, None].expand(*k.shape[:3], extra)
    ones = F.pad(q.new_ones(*q.shape[:3], 2), (0, extra - 2))
    return torch.cat([q, ones], -1), torch.cat([k, more], -1), F.pad(v, (0, extra))
