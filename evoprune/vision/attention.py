"""Attention inside groups of rows (windows or grids), batched.

Hugging Face's tower under sdpa loops over windows in Python; here groups of like length share one call. A *bucket* is such
a batch: its groups padded to a common length, with a mask where padding or unequal sizes ask for one. The plain case, equal
groups of neighbouring rows, is a view: no gather, no mask.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.clock import now
from evoprune.vision.layout import Groups

PATCHES = 4  # rows of patches a unit
SCORES = 1 << 21  # entries of a score matrix held at a time: what a CPU's caches hold


@dataclass(frozen=True)
class Bucket:
    """A batch of B groups.

    Attributes:
        query: int64 `[B, Q]` rows, or None where the bucket is all rows in order, `shape` = (B, Q).
        key: int64 `[B, K]` rows, or None for the same as the queries.
        query_valid: bool `[B, Q]`, False at padding; None without padding.
        key_count: int64 `[B, K]`: how many units of the group each key stands for, 0 at padding.
        padded: whether any key is padding.
    """

    shape: tuple[int, int]
    query: torch.Tensor | None
    key: torch.Tensor | None
    query_valid: torch.Tensor | None
    key_count: torch.Tensor
    padded: bool

    def gather(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """Rows of `x` `[R, 4, ...]` as `[B, Q or K, 4, ...]`."""
        index = self.key if which == "key" and self.key is not None else self.query
        return x.view(*self.shape, *x.shape[1:]) if index is None else x[index]


def buckets(groups: Groups) -> list[Bucket]:
    """Sorts groups into buckets: one for each length if there are few, else lengths within a quarter share one."""
    lengths = groups.key_length.unique().tolist()[::-1]
    if groups.consecutive and len(lengths) == 1:
        shape = (len(groups.length), lengths[0])
        return [Bucket(shape, None, None, None, groups.count.view(shape), False)]
    tops = lengths
    if len(lengths) > 4:
        tops = []
        for n in lengths:
            if not tops or n <= 0.75 * tops[-1]:
                tops.append(n)
    key_start = groups.key_length.cumsum(0) - groups.key_length
    made = []
    for top, below in zip(tops, [*tops[1:], 0], strict=True):
        chosen = ((groups.key_length <= top) & (groups.key_length > below)).nonzero().flatten()
        key, key_valid = _spread(key_start[chosen], groups.key_length[chosen])
        count = torch.where(key_valid, groups.count[key], 0)
        key = groups.keys[key]
        if groups.consecutive:
            query, query_valid = key, key_valid
        else:
            query, query_valid = _spread(groups.start[chosen], groups.length[chosen])
        made.append(
            Bucket(
                tuple(query.shape),
                query,
                None if groups.consecutive else key,
                None if query_valid.all() else query_valid,
                count,
                not key_valid.all(),
            )
        )
    return made


def _spread(start: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs as a padded index table `[B, longest]` and where it is valid; padding repeats a run's last entry."""
    step = torch.arange(int(length.max()))
    valid = step < length[:, None]
    return start[:, None] + torch.minimum(step, length[:, None] - 1), valid


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
    plan: list[Bucket],
    size_bias: bool = False,
    received: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Softmax attention of every row to the key rows of its group.

    Args:
        q, k, v: `[R, 4, heads, d]`, rotary already applied.
        plan: from `buckets`.
        size_bias: adds the log of the number of units that a key stands for inside the group (ToMe, arXiv 2210.09461,
            section 3: proportional attention), so that a merged row weighs as much as what went into it.
        received: float32 `[R]`, zeros, or None. How much attention each row gets is added to it: mean over heads and over
            the queries of each group, summed over its 4 patches and over the groups that see it. Over the rows of a group
            whose keys are its own rows it sums to one. It costs little where the probabilities are at hand anyway.

    Returns:
        `[R, 4, heads, d]`, and the seconds that `received` took.
    """
    out, spent = torch.empty_like(q), 0.0
    heads, dim = q.shape[2:]
    for bucket in plan:
        batch = bucket.shape[0]
        parts = [
            bucket.gather(x, which).reshape(batch, -1, heads, dim).transpose(1, 2)
            for x, which in ((q, "query"), (k, "key"), (v, "key"))
        ]
        bias = key_bias(bucket, size_bias, q.dtype)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            start = now(q.device)
            weight = None if received is None else _query_weight(bucket, heads)
            spent += now(q.device) - start if received is not None else 0.0
            answer, per_key, seconds = _attend_in_the_open(*parts, bias, weight)
        else:
            answer = F.scaled_dot_product_attention(*parts, attn_mask=bias)
            per_key, seconds = None, 0.0
            if received is not None:
                start = now(q.device)
                per_key = _received_by_keys(*parts[:2], bucket, size_bias)
                seconds = now(q.device) - start
        if received is not None:
            start = now(q.device)
            _add_by_row(received, per_key, bucket)
            spent += seconds + now(q.device) - start
        answer = answer.transpose(1, 2).reshape(batch, -1, PATCHES, heads, dim)
        if bucket.query is None:
            return answer.reshape(q.shape), spent
        if bucket.query_valid is None:
            out[bucket.query.flatten()] = answer.flatten(0, 1)
        else:
            out[bucket.query[bucket.query_valid]] = answer[bucket.query_valid]
    return out, spent


def _attend_in_the_open(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Attention as two plain products: in bf16 on CPUs they take half the time of the fused kernel, if the scores between
    them stay in the cache. Scores are rounded to bf16 on the way, as in Hugging Face's eager attention.

    Args:
        q: `[B, heads, Q, d]`, k and v: `[B, heads, K, d]`, bias: `[B, 1, 1, K]` or None.
        weight: float32 `[B, Q]`, of each query in what the keys receive; None if nobody asks.

    Returns:
        `[B, heads, Q, d]`; attention received, float32 `[B, K]` or None; and the seconds that took.
    """
    batch, heads, queries, dim = q.shape
    keys, spent = k.shape[2], 0.0
    q, k, v = (x.reshape(batch * heads, -1, dim) for x in (q, k, v))
    if bias is not None:
        bias = bias.expand(-1, heads, 1, -1).reshape(batch * heads, 1, keys)
    out, received = torch.empty_like(q), None
    if weight is not None:
        start = now(q.device)
        received = torch.zeros(batch * heads, keys)
        weight = weight.repeat_interleave(heads, 0)[:, :, None]
        spent = now(q.device) - start
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
                start = now(q.device)
                received[of] += (scores * weight[of, part]).sum(1)
                spent += now(q.device) - start
    out = out.view(batch, heads, queries, dim)
    return out, None if received is None else received.view(batch, heads, keys).sum(1), spent


def _query_weight(bucket: Bucket, heads: int) -> torch.Tensor:
    """float32 `[B, Q*4]`: each query patch's share in the mean over the queries of its group and over heads, 0 at padding."""
    valid = torch.ones(bucket.shape) if bucket.query_valid is None else bucket.query_valid.float()
    return (valid / valid.sum(1, keepdim=True) / PATCHES / heads).repeat_interleave(PATCHES, dim=1)


def _received_by_keys(queries: torch.Tensor, keys: torch.Tensor, bucket: Bucket, size_bias: bool) -> torch.Tensor:
    """Attention received by each key patch of a bucket, float32 `[B, K*4]`; queries and keys `[B, heads, Q*4 or K*4, d]`."""
    batch, heads, _, dim = queries.shape
    bias, weight = key_bias(bucket, size_bias, torch.float32), _query_weight(bucket, heads)
    total = torch.zeros(batch, keys.shape[2])
    step = max(1, SCORES // (batch * heads * keys.shape[2]))
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
        received.index_add_(0, index.flatten(), torch.where(bucket.key_count > 0, per_row, 0).flatten())
