"""Attention of all groups in one call of PyTorch's flash kernel for sequences of varying length.

The kernel reads the lengths of the groups on the GPU, so the CPU need not know them. It takes neither mask nor bias; `with_bias`
carries the cluster-size bias in extra head dimensions.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from evoprune.model.sizes import PATCHES
from evoprune.vision.buckets import Packed


@lru_cache
def varlen_kernel(device: torch.device, dtype: torch.dtype) -> Callable | None:
    """PyTorch's `varlen_attn`, or None if this torch does not have it, or the device cannot run it in this dtype."""
    if device.type != "cuda" or torch.version.cuda is None or dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


def attend_packed(
    kernel: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Packed, size_bias: bool
) -> torch.Tensor:
    """Attention of all groups in one call of `kernel`; arguments and result as in `attention.grouped_attention`."""
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
    """Carries the log of the cluster size in extra head dimensions: q' = [q, 1, 1, 0 ...], k' = [k, high, low, 0 ...].

    The kernel scales all products by 1 / sqrt(d), so the log is multiplied by sqrt(d) here. The value is the sum of two numbers,
    because one bf16 number would be off by up to 2^-9 of it. Zeros fill up to a multiple of eight dimensions, which kernels need.

    Args:
        q: `[R, 4, heads, d]`. k, v: `[K, 4, heads, d]`.
        count: int64 `[K]`, the cluster sizes; zero for a key that no group uses.

    Returns:
        q, k and v with d' dimensions; the added dimensions of v are zero.
    """
    dim = q.shape[-1]
    extra = -(dim + 2) % 8 + 2
    value = count.clamp(min=1).float().log() * dim**0.5
    high = value.to(k.dtype)
    low = (value - high.float()).to(k.dtype)
    more = F.pad(torch.stack([high, low], -1), (0, extra - 2))[:, None, None].expand(*k.shape[:3], extra)
    ones = F.pad(q.new_ones(*q.shape[:3], 2), (0, extra - 2))
    return torch.cat([q, ones], -1), torch.cat([k, more], -1), F.pad(v, (0, extra))
