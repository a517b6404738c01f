"""Attention inside groups of rows (windows or frame pairs), batched.

Hugging Face's tower under sdpa loops over windows in Python; here groups of like length share one call. A *bucket* is such
a batch: its groups padded to a common length, with a mask where padding or unequal sizes ask for one. The plain case, equal
groups of neighbouring rows, is a view: no gather, no mask.

The CPU sorts groups by their lengths, which it can look up. On a GPU looking them up would make the host wait, so all groups go
at once: through a kernel for sequences of varying length that reads the lengths on the device, or, where there is none, through
one bucket padded to the greatest length there can be.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F

from evoprune.model.sizes import PATCHES
from evoprune.pruning.indices import runs
from evoprune.vision.layout import Groups
from evoprune.vision.timer import Timer

# Entries of a score matrix held at a time: what a CPU's caches hold; a GPU wants more at once.
SCORES = 1 << 21
GPU_SCORES = 1 << 26


@dataclass(frozen=True)
class Bucket:
    """A batch of B groups.

    Attributes:
        query: int64 `[B, Q]` rows, or None where the bucket is all rows in order, `shape` = (B, Q).
        key: int64 `[B, K]` rows, or None for the same as the queries.
        query_valid: bool `[B, Q]`, False at padding; None without padding.
        key_count: int64 `[B, K]`: how many units of the group each key stands for, 0 at padding.
        padded: whether any key is padding.
        near: bool `[B, K]`: whether the key is a row of the block of the group, False at padding; None where every key is.
        back: int64 `[R]`, where the answer to each row lies among the B * Q; None where it takes a mask to tell.
    """

    shape: tuple[int, int]
    query: torch.Tensor | None
    key: torch.Tensor | None
    query_valid: torch.Tensor | None
    key_count: torch.Tensor
    padded: bool
    back: torch.Tensor | None = None
    near: torch.Tensor | None = None

    def gather(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """Rows of `x` `[R, 4, ...]` as `[B, Q or K, 4, ...]`."""
        index = self.key if which == "key" and self.key is not None else self.query
        return x.view(*self.shape, *x.shape[1:]) if index is None else x[index]

    def by_head(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """Rows of `x` `[R, 4, heads, d]` as `[B, heads, Q*4 or K*4, d]`."""
        return self.gather(x, which).reshape(self.shape[0], -1, *x.shape[2:]).transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """All groups as a device takes them without the host knowing their lengths. From groups that are not `exact`."""

    groups: Groups
    rows: int

    @cached_property
    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 `[G + 1]`: where the query patches of each group end and where its key patches do, after a zero."""
        lengths = torch.stack([self.groups.length, self.groups.key_length])
        query, key = F.pad(lengths.cumsum(1) * PATCHES, (1, 0)).int().unbind(0)
        return query.contiguous(), key.contiguous()

    @cached_property
    def bucket(self) -> Bucket:
        """All groups padded to the greatest length a group may have."""
        groups, count, (longest, most) = self.groups, len(self.groups.length), self.groups.longest
        if groups.even:
            return Bucket((count, longest), None, None, None, groups.count.view(count, longest), False)
        query, valid = runs(groups.start, groups.length, longest, self.rows)
        key, key_valid = query, valid
        if not groups.consecutive:
            start = groups.key_length.cumsum(0) - groups.key_length
            key, key_valid = runs(start, groups.key_length, most, len(groups.keys))
        units = torch.where(key_valid, groups.count[key], 0)
        row = torch.arange(self.rows)
        group = torch.searchsorted(groups.start + groups.length, row, right=True).clamp(max=count - 1)
        back = (group * longest + row - groups.start[group]).clamp(max=count * longest - 1)
        keys = None if groups.consecutive else groups.keys[key]
        near = None if groups.near is None else groups.near[key] & key_valid
        return Bucket((count, longest), query, keys, valid, units, True, back, near)


def buckets(groups: Groups) -> list[Bucket]:
    """Sorts groups into buckets: by the number of keys, one for each if there are few, else within a quarter; and where queries
    are not the same as keys, by the number of queries within a half, so that a group with one new row is not padded to a full one.
    """
    lengths = groups.key_length.unique()
    if groups.consecutive and len(lengths) == 1:
        shape = (len(groups.length), int(lengths))
        return [Bucket(shape, None, None, None, groups.count.view(shape), False)]
    key_start = groups.key_length.cumsum(0) - groups.key_length
    rows, made = int(groups.length.sum()), []
    for like in _alike(groups.key_length, 0.75 if len(lengths) > 4 else 1.0):
        parts = [like] if groups.consecutive else [like[some] for some in _alike(groups.length[like], 0.5)]
        for chosen in parts:
            key_length = groups.key_length[chosen]
            key, key_valid = runs(key_start[chosen], key_length, int(key_length.max()), len(groups.keys))
            count = torch.where(key_valid, groups.count[key], 0)
            near = None if groups.near is None else groups.near[key] & key_valid
            key = groups.keys[key]
            if groups.consecutive:
                query, query_valid = key, key_valid
            else:
                length = groups.length[chosen]
                query, query_valid = runs(groups.start[chosen], length, int(length.max()), rows)
            made.append(
                Bucket(
                    tuple(query.shape),
                    query,
                    None if groups.consecutive else key,
                    None if query_valid.all() else query_valid,
                    count,
                    not key_valid.all(),
                    near=near,
                )
            )
    return made


def _alike(length: torch.Tensor, share: float) -> Iterator[torch.Tensor]:
    """Groups of like `length` (int64 `[G]`), longest first: those longer than `share` of the longest that is left, as indices."""
    left = length.unique().tolist()[::-1]
    while left:
        below = [n for n in left[1:] if n <= share * left[0]]
        yield ((length <= left[0]) & (length > (below[0] if below else 0))).nonzero().flatten()
        left = below


def key_bias(bucket: Bucket, size_bias: bool, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scores of each key patch, `[B, 1, 1, K*4]`: log of the units it stands for, -inf at padding."""
    if not size_bias and not bucket.padded:
        return None
    count = bucket.key_count.float() if size_bias else (bucket.key_count > 0).float()
    return count.log().to(dtype).repeat_interleave(PATCHES, dim=1)[:, None, None]


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: list[Bucket] | Packed,
    size_bias: bool = False,
    received: torch.Tensor | None = None,
    timer: Timer | None = None,
) -> torch.Tensor:
    """Softmax attention of every row to the key rows of its group.

    Args:
        q, k, v: `[R, 4, heads, d]`, rotary already applied.
        plan: from `buckets`, or all groups packed.
        size_bias: adds the log of the number of units that a key stands for inside the group (ToMe, arXiv 2210.09461,
            section 3: proportional attention), so that a merged row weighs as much as what went into it.
        received: float32 `[R]`, zeros, or None. How much attention each row gets is added to it: mean over heads and over
            the queries of each group, summed over its 4 patches and over the groups of its own block that see it: what later
            blocks look at is not known where a chunk ends with it. Over the rows of a group whose keys are its own rows it sums
            to one. It costs little where the probabilities are at hand anyway.
        timer: measures what `received` takes.

    Returns:
        `[R, 4, heads, d]`.
    """
    out, timer = torch.empty_like(q), timer or nullcontext()
    heads, dim = q.shape[2:]
    if isinstance(plan, Packed):
        kernel = varlen_kernel(q.device, q.dtype)
        if kernel is not None:
            if received is not None:
                with timer:
                    queries, keys = plan.bucket.by_head(q, "query"), plan.bucket.by_head(k, "key")
                    _add_by_row(received, _received_by_keys(queries, keys, plan.bucket, size_bias), plan.bucket)
            return _attend_packed(kernel, q, k, v, plan, size_bias)
        plan = [plan.bucket]
    for bucket in plan:
        parts = [bucket.by_head(x, which) for x, which in ((q, "query"), (k, "key"), (v, "key"))]
        bias, per_key = key_bias(bucket, size_bias, q.dtype), None
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            weight = None
            if received is not None:
                with timer:
                    weight = _query_weight(bucket, heads)
            answer, per_key = attend_by_products(*parts, bias, weight, timer)
        else:
            answer = F.scaled_dot_product_attention(*parts, attn_mask=bias)
        if received is not None:
            with timer:
                if per_key is None:
                    per_key = _received_by_keys(*parts[:2], bucket, size_bias)
                _add_by_row(received, per_key, bucket)
        answer = answer.transpose(1, 2).reshape(len(answer), -1, PATCHES, heads, dim)
        if bucket.query is None:
            return answer.reshape(q.shape)
        if bucket.back is not None:
            return answer.flatten(0, 1)[bucket.back]
        if bucket.query_valid is None:
            out[bucket.query.flatten()] = answer.flatten(0, 1)
        else:
            out[bucket.query[bucket.query_valid]] = answer[bucket.query_valid]
    return out


@lru_cache
def varlen_kernel(device: torch.device, dtype: torch.dtype) -> Callable | None:
    """PyTorch's flash attention for sequences of varying length, where this torch has it and the device can run it."""
    if device.type != "cuda" or torch.version.cuda is None or dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


def _attend_packed(
    kernel: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Packed, size_bias: bool
) -> torch.Tensor:
    """Attention of all groups in one call of a kernel that takes neither mask nor bias; `[R, 4, heads, d]`."""
    groups, dim = plan.groups, q.shape[-1]
    key, value = (x if groups.consecutive else x[groups.keys] for x in (k, v))
    if size_bias:
        q, key, value = with_bias(q, key, value, groups.count)
    answer = kernel(
        *(x.flatten(0, 1) for x in (q, key, value)),
        *plan.ends,
        *(longest * PATCHES for longest in groups.longest),
        scale=dim**-0.5,
    )
    return answer[..., :dim].unflatten(0, (-1, PATCHES))


def with_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Carries the log of the units that keys stand for in extra head dimensions: q' = [q, 1, 1, 0 ...], k' = [k, high, low, 0 ...].

    The scale stays that of the original dimension, by which the log is divided. Its value goes in two parts, because one number in
    bf16 would be off by up to 2^-9 of it. Kernels want a multiple of eight dimensions.

    Args:
        q: `[R, 4, heads, d]`, k, v: `[K, 4, heads, d]`, count: int64 `[K]`; where it is zero the key is not to be used.

    Returns:
        q, k and v of d' dimensions; the added ones of v are zero.
    """
    dim = q.shape[-1]
    extra = -(dim + 2) % 8 + 2
    value = count.clamp(min=1).float().log() * dim**0.5
    high = value.to(k.dtype)
    low = (value - high.float()).to(k.dtype)
    more = F.pad(torch.stack([high, low], -1), (0, extra - 2))[:, None, None].expand(*k.shape[:3], extra)
    ones = F.pad(q.new_ones(*q.shape[:3], 2), (0, extra - 2))
    return torch.cat([q, ones], -1), torch.cat([k, more], -1), F.pad(v, (0, extra))


def attend_by_products(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    timer: AbstractContextManager,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as two plain products: in bf16 on CPUs they take half the time of the fused kernel, if the scores between
    them stay in the cache. Scores are rounded to bf16 on the way, as in Hugging Face's eager attention.

    Args:
        q: `[B, heads, Q, d]`, k and v: `[B, heads, K, d]`, bias: `[B, 1, 1, K]` or None.
        weight: float32 `[B, Q]`, of each query in what the keys receive; None if nobody asks.
        timer: measures what that takes.

    Returns:
        `[B, heads, Q, d]`, and attention received, float32 `[B, K]` or None.
    """
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    q, k, v = (x.reshape(batch * heads, -1, dim) for x in (q, k, v))
    if bias is not None:
        bias = bias.expand(-1, heads, 1, -1).reshape(batch * heads, 1, keys)
    out, received = torch.empty_like(q), None
    if weight is not None:
        with timer:
            received = torch.zeros(batch * heads, keys)
            weight = weight.repeat_interleave(heads, 0)[:, :, None]
    rows = max(1, min(queries, SCORES // keys))
    groups = max(1, min(len(q), SCORES // (rows * keys)))
    for g in range(0, len(q), groups):
        of = slice(g, g + groups)
        some, beta = (q.new_empty(1), 0) if bias is None else (bias[of], 1)
        for at in range(0, queries, rows):
            part = slice(at, at + rows)
            scores = torch.baddbmm(some, q[of, part], k[of].transpose(1, 2), beta=beta, alpha=dim**-0.5).softmax(-1)
            out[of, part] = torch.bmm(scores, v[of])
            if received is not None:
                with timer:
                    received[of] += (scores * weight[of, part]).sum(1)
    out = out.view(batch, heads, queries, dim)
    return out, None if received is None else received.view(batch, heads, keys).sum(1)


def attention_received(q: torch.Tensor, k: torch.Tensor, plan: list[Bucket] | Packed, size_bias: bool) -> torch.Tensor:
    """How much attention each row gets, by itself, without the answers.

    Args:
        q: `[R, 4, heads, d]`, k: `[R or more, 4, heads, d]`, plan, size_bias: as in `grouped_attention`.

    Returns:
        float32 `[R]`, otherwise as `received` there.
    """
    total = torch.zeros(len(k))
    for bucket in [plan.bucket] if isinstance(plan, Packed) else plan:
        queries, keys = bucket.by_head(q, "query"), bucket.by_head(k, "key")
        _add_by_row(total, _received_by_keys(queries, keys, bucket, size_bias), bucket)
    return total[: len(q)]


def _query_weight(bucket: Bucket, heads: int) -> torch.Tensor:
    """float32 `[B, Q*4]`: each query patch's share in the mean over the queries of its group and over heads, 0 at padding."""
    valid = torch.ones(bucket.shape) if bucket.query_valid is None else bucket.query_valid.float()
    return (valid / valid.sum(1, keepdim=True).clamp(min=1) / PATCHES / heads).repeat_interleave(PATCHES, dim=1)


def _received_by_keys(queries: torch.Tensor, keys: torch.Tensor, bucket: Bucket, size_bias: bool) -> torch.Tensor:
    """Attention received by each key patch of a bucket, float32 `[B, K*4]`; queries and keys `[B, heads, Q*4 or K*4, d]`."""
    batch, heads, _, dim = queries.shape
    bias, weight = key_bias(bucket, size_bias, torch.float32), _query_weight(bucket, heads)
    total = torch.zeros(batch, keys.shape[2])
    held = SCORES if queries.device.type == "cpu" else GPU_SCORES
    step = max(1, held // (batch * heads * keys.shape[2]))
    for at in range(0, queries.shape[2], step):
        scores = (queries[:, :, at : at + step] * dim**-0.5) @ keys.transpose(2, 3)
        probs = (scores.float() if bias is None else scores.float() + bias).softmax(-1)
        total += torch.einsum("bhqk,bq->bk", probs, weight[:, at : at + step])
    return total


def _add_by_row(received: torch.Tensor, per_key: torch.Tensor, bucket: Bucket) -> None:
    """Adds what the key patches of a bucket received `[B, K*4]` to their rows."""
    per_row = per_key.view(len(per_key), -1, PATCHES).sum(2)
    index = bucket.key if bucket.key is not None else bucket.query
    if index is None:
        received += per_row.flatten()
    else:
        counts = bucket.key_count > 0 if bucket.near is None else bucket.near
        received.index_add_(0, index.flatten(), torch.where(counts, per_row, 0).flatten())
