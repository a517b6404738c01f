"""Attention of rows inside their groups (windows or frame pairs), over all groups of a chunk.

Groups of similar length share a *bucket*: they are padded to a common length, and a mask covers the padding. Equal groups of
neighbouring rows need no padding, so their bucket is a view without gather or mask. On a CPU, `buckets` sorts the groups by
their lengths. On a GPU, reading the lengths would synchronise. There `Packed` holds all groups for a kernel that reads the
lengths on the device; without one, they are a bucket padded to the greatest possible length. `plan_attention` chooses.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from evoprune.backend import devices
from evoprune.backend.attention import attends_by_products, varlen_kernel
from evoprune.methods.indices import ascending, runs
from evoprune.model.config import PATCHES
from evoprune.model.numerics import without_autocast
from evoprune.vision.layout import Groups, Scope, TokenLayout, attention_groups


@dataclass(frozen=True)
class Bucket:
    """A batch of B groups, with Q query rows and K key rows each."""

    shape: tuple[int, int]  # (B, Q)
    query: torch.Tensor | None  # int64 `[B, Q]` rows, or None where the bucket is all rows in order
    key: torch.Tensor | None  # int64 `[B, K]` rows, or None where the keys are the queries
    query_valid: torch.Tensor | None  # bool `[B, Q]`, False at padding; None without padding
    key_count: torch.Tensor  # int64 `[B, K]`, how many units of the group each key represents; 0 at padding
    padded: bool  # whether any key is padding
    # int64 `[R]`, the index of each row among the B * Q answers; None where `query` and `query_valid` say it
    back: torch.Tensor | None = None
    # bool `[B, K]`, whether the key is a row of the group's own frame pair, False at padding; None where every key is
    near: torch.Tensor | None = None

    def by_head(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """Rows of `x` `[R, 4, heads, d]` as `[B, heads, Q*4 or K*4, d]`; `which`: "query" or "key"."""
        index = self.key if which == "key" and self.key is not None else self.query
        rows = x if index is None else x[index]
        return rows.reshape(self.shape[0], -1, *x.shape[2:]).transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """All groups of a chunk, for a device whose values the CPU does not read."""

    groups: Groups  # from `layout.attention_groups` with `exact=False`
    rows: int  # R, of the chunk
    kernel: Callable | None  # `varlen_kernel`; None where there is nothing but `bucket`

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of all groups in one call of the kernel; arguments `[patches, heads, d]`, keys group after group."""
        longest = [most * PATCHES for most in self.groups.longest]
        return self.kernel(q, k, v, *self.ends, *longest, scale=scale)

    @cached_property
    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two int32 `[G + 1]`, each a zero and the ends of all groups: counted in query patches, and in key patches."""
        lengths = torch.stack([self.groups.length, self.groups.key_length])
        query, key = F.pad(lengths.cumsum(1) * PATCHES, (1, 0)).int().unbind(0)
        return query.contiguous(), key.contiguous()

    @cached_property
    def bucket(self) -> Bucket:
        """One bucket of all groups, padded to the greatest length that a group can have."""
        groups, count, longest = self.groups, len(self.groups.length), self.groups.longest[0]
        if groups.even:
            return Bucket((count, longest), None, None, None, groups.count.view(count, longest), False)
        row = ascending(self.rows, groups.start.device)
        group = torch.searchsorted(groups.start + groups.length, row, right=True).clamp(max=count - 1)
        back = (group * longest + row - groups.start[group]).clamp(max=count * longest - 1)
        return _padded(groups, self.rows, ascending(count, row.device), *groups.longest, back)


Plan = list[Bucket] | Packed


def plan_attention(layout: TokenLayout, scope: Scope, like: torch.Tensor) -> Plan:
    """How the rows of a layout attend inside their groups of `scope`, by the device and the dtype of `like`."""
    exact = devices.exact_shapes(like.device)
    groups = attention_groups(layout, scope, exact)
    if exact:
        return buckets(groups)
    packed = Packed(groups, layout.rows, varlen_kernel(like.device, like.dtype))
    return packed if packed.kernel else [packed.bucket]


def _padded(
    groups: Groups, rows: int, members: torch.Tensor, longest: int, most: int, back: torch.Tensor | None = None
) -> Bucket:
    """The bucket of some groups (int64 `[B]`), padded to `longest` queries and `most` keys. `rows`: of all groups.

    `back`: see `Bucket`; without it, whether there is padding is read, which synchronises.
    """
    query, valid = runs(groups.start[members], groups.length[members], longest, rows)
    start = groups.key_length.cumsum(0) - groups.key_length
    key, key_valid = runs(start[members], groups.key_length[members], most, len(groups.keys))
    return Bucket(
        tuple(query.shape),
        query,
        None if groups.consecutive else groups.keys[key],
        None if back is None and valid.all() else valid,
        torch.where(key_valid, groups.count[key], 0),
        back is not None or not key_valid.all(),
        back,
        None if groups.near is None else groups.near[key] & key_valid,
    )


def buckets(groups: Groups) -> list[Bucket]:
    """Sorts groups into buckets of similar length.

    Up to four different numbers of keys get a bucket each; more are put together where they differ by less than a quarter. Where
    queries and keys are not the same rows, a bucket is divided again: its numbers of queries differ by less than a half. So a group
    with one new row is not padded to a full group.
    """
    lengths = groups.key_length.unique()
    if groups.consecutive and len(lengths) == 1:
        shape = (len(groups.length), int(lengths))
        return [Bucket(shape, None, None, None, groups.count.view(shape), False)]
    rows, made = int(groups.length.sum()), []
    for like in _alike(groups.key_length, 0.75 if len(lengths) > 4 else 1.0):
        batches = [like] if groups.consecutive else [like[some] for some in _alike(groups.length[like], 0.5)]
        for members in batches:
            longest, most = (int(each[members].max()) for each in (groups.length, groups.key_length))
            made.append(_padded(groups, rows, members, longest, most))
    return made


def _alike(length: torch.Tensor, share: float) -> Iterator[torch.Tensor]:
    """Divides groups by `length` (int64 `[G]`), longest first: each time the indices of all above `share` of the longest left."""
    left = length.unique().tolist()[::-1]
    while left:
        below = [n for n in left[1:] if n <= share * left[0]]
        yield ((length <= left[0]) & (length > (below[0] if below else 0))).nonzero().flatten()
        left = below


def key_bias(bucket: Bucket, size_bias: bool, dtype: torch.dtype) -> torch.Tensor | None:
    """The bias on the scores of each key patch, `[B, 1, 1, K*4]`; None where it is zero everywhere.

    It is the log of the key's cluster size, or 0 without `size_bias`; -inf at padding.
    """
    if not size_bias and not bucket.padded:
        return None
    count = bucket.key_count.float() if size_bias else (bucket.key_count > 0).float()
    return count.log().to(dtype).repeat_interleave(PATCHES, dim=1)[:, None, None]


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    size_bias: bool = False,
    received: torch.Tensor | None = None,
    timer: devices.Timer | None = None,
) -> torch.Tensor:
    """Softmax attention of every row to the key rows of its group, `[R, 4, heads, d]`.

    Args:
        q, k, v: `[R, 4, heads, d]`, after rotary.
        size_bias: adds to the scores of a key the log of its cluster size inside the group (proportional attention: ToMe, arXiv
            2210.09461, section 3).
        received: float32 `[R]`, to which the attention is added that each row receives: the mean over heads and over the queries of
            a group, summed over the row's 4 patches and over the groups of its own chunk. Later chunks are left out, because the
            result must not depend on the chunk size. `timer` measures the time for it.
    """
    timer = timer or nullcontext()
    if isinstance(plan, Packed):
        if received is not None:
            with timer:
                add_received(received, q, k, plan.bucket, size_bias)
        return attend_packed(q, k, v, plan, size_bias)
    out = torch.empty_like(q)
    for bucket in plan:
        answer = _attend_bucket(q, k, v, bucket, size_bias, received, timer)
        if bucket.query is None:
            return answer.reshape(q.shape)
        if bucket.back is not None:
            return answer.flatten(0, 1)[bucket.back]
        valid = ... if bucket.query_valid is None else bucket.query_valid
        out[bucket.query[valid]] = answer[valid]
    return out


def _attend_bucket(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bucket: Bucket,
    size_bias: bool,
    received: torch.Tensor | None,
    timer: AbstractContextManager,
) -> torch.Tensor:
    """Attention of one bucket, `[B, Q, 4, heads, d]`; arguments as in `grouped_attention`."""
    query, key, value = (bucket.by_head(x, which) for x, which in ((q, "query"), (k, "key"), (v, "key")))
    bias, per_key = key_bias(bucket, size_bias, q.dtype), None
    if attends_by_products(q, key.shape[2]):
        weight = None
        if received is not None:
            with timer:
                weight = query_weight(bucket, q.shape[2])
        answer, per_key = attend_by_products(query, key, value, bias, weight, timer)
    else:
        answer = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    if received is not None:
        with timer:
            if per_key is None:
                per_key = received_by_keys(query, key, bucket, size_bias)
            add_by_row(received, per_key, bucket)
    return answer.transpose(1, 2).reshape(len(answer), -1, PATCHES, *q.shape[2:])


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
    out, received = torch.empty_like(q), None
    if weight is not None:
        with timer:
            received = torch.zeros(batch * heads, keys, dtype=torch.float32, device=q.device)
            weight = weight.repeat_interleave(heads, 0)[:, :, None]
    held = devices.scores_at_a_time(q.device)
    rows = max(1, min(queries, held // keys))
    groups = max(1, min(len(q), held // (rows * keys)))
    for g in range(0, len(q), groups):
        of = slice(g, g + groups)
        some, beta = (q.new_empty(1), 0) if bias is None else (bias[of], 1)
        for at in range(0, queries, rows):
            piece = slice(at, at + rows)
            scores = torch.baddbmm(some, q[of, piece], k[of].transpose(1, 2), beta=beta, alpha=dim**-0.5).softmax(-1)
            out[of, piece] = torch.bmm(scores, v[of])
            if received is not None:
                with timer:
                    received[of] += (scores * weight[of, piece]).sum(1)
    out = out.view(batch, heads, queries, dim)
    return out, None if received is None else received.view(batch, heads, keys).sum(1)


def attention_received(q: torch.Tensor, k: torch.Tensor, plan: Plan, size_bias: bool) -> torch.Tensor:
    """float32 `[R]`, as `received` of `grouped_attention`, without the output of the attention."""
    total = torch.zeros(len(k), dtype=torch.float32, device=k.device)
    for bucket in [plan.bucket] if isinstance(plan, Packed) else plan:
        add_received(total, q, k, bucket, size_bias)
    return total[: len(q)]


def add_received(received: torch.Tensor, q: torch.Tensor, k: torch.Tensor, bucket: Bucket, size_bias: bool) -> None:
    """Adds the attention that the rows of a bucket receive, as `grouped_attention`."""
    per_key = received_by_keys(bucket.by_head(q, "query"), bucket.by_head(k, "key"), bucket, size_bias)
    add_by_row(received, per_key, bucket)


@without_autocast()
def received_by_keys(queries: torch.Tensor, keys: torch.Tensor, bucket: Bucket, size_bias: bool) -> torch.Tensor:
    """The attention that each key patch of a bucket receives, float32 `[B, K*4]`, from `queries` and `keys` by head."""
    batch, heads, _, dim = queries.shape
    bias, weight = key_bias(bucket, size_bias, torch.float32), query_weight(bucket, heads)
    total = torch.zeros(batch, keys.shape[2], dtype=torch.float32, device=keys.device)
    step = max(1, devices.scores_at_a_time(queries.device) // (batch * heads * keys.shape[2]))
    for at in range(0, queries.shape[2], step):
        scores = (queries[:, :, at : at + step] * dim**-0.5) @ keys.transpose(2, 3)
        probs = (scores.float() if bias is None else scores.float() + bias).softmax(-1)
        total += torch.einsum("bhqk,bq->bk", probs, weight[:, at : at + step])
    return total


def query_weight(bucket: Bucket, heads: int) -> torch.Tensor:
    """float32 `[B, Q*4]`: the weight of each query patch in the mean over heads and queries of its group; 0 at padding."""
    valid = bucket.query_valid
    valid = bucket.key_count.new_ones(bucket.shape, dtype=torch.float32) if valid is None else valid.float()
    return (valid / valid.sum(1, keepdim=True).clamp(min=1) / PATCHES / heads).repeat_interleave(PATCHES, dim=1)


def add_by_row(received: torch.Tensor, per_key: torch.Tensor, bucket: Bucket) -> None:
    """Adds what the key patches of a bucket receive (`per_key`, float32 `[B, K*4]`) to their rows in `received`, float32 `[R]`."""
    per_row = per_key.view(len(per_key), -1, PATCHES).sum(2)
    index = bucket.key if bucket.key is not None else bucket.query
    if index is None:
        received += per_row.flatten()
    else:
        own = bucket.key_count > 0 if bucket.near is None else bucket.near
        received.index_add_(0, index.flatten(), torch.where(own, per_row, 0).flatten())


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Packed, size_bias: bool) -> torch.Tensor:
    """Attention of all groups by a kernel that reads their lengths on the GPU; it takes neither mask nor bias."""
    groups, dim = plan.groups, q.shape[-1]
    key, value = (x if groups.consecutive else x[groups.keys] for x in (k, v))
    if size_bias:
        q, key, value = with_bias(q, key, value, groups.count)
    answer = plan.attend(*(x.flatten(0, 1) for x in (q, key, value)), scale=dim**-0.5)
    return answer[..., :dim].unflatten(0, (-1, PATCHES))


def with_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Carries the log of `count` (int64 `[K]`) in extra head dimensions: q' = [q, 1, 1, 0 ...], k' = [k, high, low, 0 ...].

    The kernel scales all products by 1 / sqrt(d), so the log is multiplied by sqrt(d) here. It is the sum of two numbers, because
    one bf16 number would be off by up to 2^-9 of it. Zeros fill up to a multiple of eight dimensions, which kernels need.
    """
    dim = q.shape[-1]
    extra = -(dim + 2) % 8 + 2
    value = count.clamp(min=1).float().log() * dim**0.5
    high = value.to(k.dtype)
    low = (value - high.float()).to(k.dtype)
    more = F.pad(torch.stack([high, low], -1), (0, extra - 2))[:, None, None].expand(*k.shape[:3], extra)
    ones = F.pad(q.new_ones(*q.shape[:3], 2), (0, extra - 2))
    return torch.cat([q, ones], -1), torch.cat([k, more], -1), F.pad(v, (0, extra))
