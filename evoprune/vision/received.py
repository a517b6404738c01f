"""Attention received: how much attention each row gets from the queries of its group."""

import torch

from evoprune.model.autocast import without_autocast
from evoprune.model.sizes import PATCHES
from evoprune.vision import devices
from evoprune.vision.buckets import Bucket, Packed, key_bias


def attention_received(q: torch.Tensor, k: torch.Tensor, plan: list[Bucket] | Packed, size_bias: bool) -> torch.Tensor:
    """The attention that each row receives, without computing the output of the attention.

    Args:
        q: `[R, 4, heads, d]`. k: `[R or more, 4, heads, d]`. plan, size_bias: as in `attention.grouped_attention`.

    Returns:
        float32 `[R]`, as `received` of `attention.grouped_attention`.
    """
    total = torch.zeros(len(k), dtype=torch.float32, device=k.device)
    for bucket in [plan.bucket] if isinstance(plan, Packed) else plan:
        queries, keys = bucket.by_head(q, "query"), bucket.by_head(k, "key")
        add_by_row(total, received_by_keys(queries, keys, bucket, size_bias), bucket)
    return total[: len(q)]


@without_autocast()
def received_by_keys(queries: torch.Tensor, keys: torch.Tensor, bucket: Bucket, size_bias: bool) -> torch.Tensor:
    """The attention that each key patch of a bucket receives, float32 `[B, K*4]`.

    Args:
        queries: `[B, heads, Q*4, d]`. keys: `[B, heads, K*4, d]`.
    """
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
    if valid is None:
        valid = torch.ones(bucket.shape, dtype=torch.bool, device=bucket.key_count.device)
    valid = valid.float()
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
