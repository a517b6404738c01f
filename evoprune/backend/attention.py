"""Attention by device: on CUDA never cuDNN's, which plans each new shape for up to seconds; kernels for prompts and for groups."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

import torch
import torch.nn.functional as F

from evoprune.backend.devices import as_current, is_host, uses_kernels

T = TypeVar("T")

# Keys from which on the fused kernel is faster, because scores no longer stay in the cache. With the 36,864 patches of a picture of
# 2688x2688 pixels it takes a third of the time.
LONG = 4096
NEVER = 1000.0  # the log of one over the weight of a key that does not count, where a kernel takes no infinity

_lock = threading.Lock()
_inside = 0
_before = False


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Provide a context, and a decorator, in which `scaled_dot_product_attention` does not choose cuDNN.

    The flag is the process's: the first thread that enters notes it, and the last one that leaves puts it back.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.backends.cuda.enable_cudnn_sdp(_before)


def attends_by_products(queries: torch.Tensor, keys: int) -> bool:
    """Return whether two products with the scores between them are faster than a fused kernel: in bf16 on a CPU, of so many
    keys.
    """
    return is_host(queries.device) and queries.dtype == torch.bfloat16 and keys < LONG


def transformers_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Return the fastest attention that transformers has on a device: flash-attn's where it is installed, else torch's."""
    if is_host(device) or dtype.itemsize != 2 or find_spec("flash_attn") is None:
        return "sdpa"
    return "flash_attention_2"


def attention_note(device: torch.device, attention: str) -> str | None:
    """Return what is to be known of transformers' tower where it runs this attention; None on a CPU."""
    if is_host(device):
        return None
    note = f"transformers runs {attention}"
    if attention == "sdpa":
        note += ", whose tower loops over windows in Python; flash-attn, which does not, is not installed"
    return note


def varlen_kernel(device: torch.device, dtype: torch.dtype) -> Callable | None:
    """Return attention of groups of any lengths in one call; None where torch does not have it in this dtype on this device.

    It is called with queries, keys and values `[patches, heads, d]`, the ends of groups among queries and among keys (int32), the
    greatest number of each, and `scale`.
    """
    if not uses_kernels(device) or torch.version.cuda is None or dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return None
    return attend_varlen


def form_of_groups(
    like: torch.Tensor, by_length: Callable[[], T], packed: Callable[[Callable], T], padded: Callable[[], T]
) -> T:
    """Return groups that attend, in the form for the device and the dtype of `like`.

    `by_length` reads their lengths, `packed` takes the kernel of `varlen_kernel`, and `padded` serves where there is none.
    """
    if is_host(like.device):
        return by_length()
    kernel = varlen_kernel(like.device, like.dtype)
    return packed(kernel) if kernel else padded()


def attend_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest: int,
    most: int,
    scale: float,
) -> torch.Tensor:
    """Attend as `varlen_kernel` says. `torch.nn.attention.varlen` calls the same, but its import takes longer."""
    lengths = query_ends, key_ends, longest, most
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False, scale=scale)[0]


def causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
) -> torch.Tensor | None:
    """Return attention of the last L of n columns, by heads, `[..., L, d]`; None where no kernel does it without a mask.

    On CUDA a kernel without a mask is several times faster than one with a mask.
    """
    if queries.shape[2] == keys.shape[2]:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
    if not uses_kernels(queries.device):
        return None
    # Not `torch.nn.attention.bias`, which calls the same and imports the whole of torch.compile. Flash attention's "causal" ends at
    # the lower right; the check is of shapes and types, and refuses "causal" because that of torch begins at the upper left.
    params = torch.backends.cuda.SDPAParams(queries, keys, values, None, 0.0, False, False)
    with as_current(queries.device):  # whose capability is asked for
        if not torch.backends.cuda.can_use_flash_attention(params) or queries.shape[3] % 8:
            return None
    return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, True, False, scale=scale)[0]


def bias_features(bias: torch.Tensor, dim: int, dtype: torch.dtype, least: float = -math.inf) -> torch.Tensor:
    """Return features `[n, e]` behind those of keys, `dim`. Their product with ones is a bias on the scores of keys, float32 `[n]`.

    A kernel that takes no mask takes them: heads may have up to 256 features, in multiples of eight. Scores are divided by the root
    of `dim`, so the bias is multiplied by it here. It is the sum of two numbers, because one in bf16 would be off by up to 2^-9 of
    it. Products below `least` become `least`.
    """
    least = max(least, torch.finfo(dtype).min / 4)  # -inf times 0 would be NaN
    value = (bias * dim**0.5).clamp(min=least)
    high = value.to(dtype)
    return F.pad(torch.stack([high, (value - high.float()).to(dtype)], -1), (0, -(dim + 2) % 8))


def room_for_bias(bias: torch.Tensor, like: torch.Tensor, kv_heads: int, dim: int) -> torch.Tensor | None:
    """Return room `[2, kv_heads, n, dim + e]` for keys and values of a layer; behind keys features of a bias, behind values 0.

    Kernels that take masks are slow on a GPU. None where there are no others, or for a single column: then the bias is a mask.

    Args:
        bias: float32 `[n]`, on the scores of keys. like: columns `[L, hidden]`, whose dtype is that of the keys. dim: of a head.
    """
    if len(like) == 1 or not uses_kernels(like.device):
        return None
    features = bias_features(bias, dim, like.dtype)
    room = features.new_zeros(2, kv_heads, len(features), dim + features.shape[1])
    room[0, :, :, dim:] = features
    return room
