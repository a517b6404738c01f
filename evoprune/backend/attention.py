"""Attention for each device, with kernels for prompts and for groups of patches.

cuDNN attention is never used on CUDA, because it can spend seconds planning for each new shape.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Self, TypeVar

import torch
import torch.nn.functional as F

from evoprune.backend.devices import as_current, is_host, uses_kernels

T = TypeVar("T")

# From this number of keys on, the fused kernel is faster, because the scores no longer fit into the CPU cache. For an image of
# 2688x2688 pixels (36,864 patches), it takes a third of the time.
LONG = 4096

_lock = threading.Lock()
_active = 0  # the number of active `without_cudnn` contexts
_setting_before = False


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Keep `scaled_dot_product_attention` from choosing cuDNN. Works as a context manager and as a decorator.

    The setting is process-wide. The first thread to enter saves its value, and the last thread to leave restores it.
    """
    global _active, _setting_before
    with _lock:
        if not _active:
            _setting_before = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _active += 1
    try:
        yield
    finally:
        with _lock:
            _active -= 1
            if not _active:
                torch.backends.cuda.enable_cudnn_sdp(_setting_before)


class Attention:
    """Decides how attention runs on a device in a given dtype.

    Args:
        device: The device of the queries, keys and values.
        dtype: The dtype of the queries, keys and values.
    """

    # Kernels that cannot handle an infinite bias ignore a key by giving it the weight e^-NEVER.
    NEVER = 1000.0

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device = device
        self._dtype = dtype

    @classmethod
    def of(cls, x: torch.Tensor) -> Self:
        """Return the attention for tensors with the device and dtype of `x`."""
        return cls(x.device, x.dtype)

    def prefers_products(self, keys: int) -> bool:
        """Return True if two matrix products are faster than a fused kernel for this number of keys.

        This is the case for bf16 on a CPU with fewer than `LONG` keys. The scores between the two products are held in memory.
        """
        return is_host(self._device) and self._dtype == torch.bfloat16 and keys < LONG

    def of_transformers(self) -> tuple[str, str | None]:
        """Return the fastest attention implementation in transformers: flash-attn if it is installed, otherwise torch's SDPA.

        The second value is a note for reports on how the transformers tower runs with it, or None on a CPU.
        """
        if is_host(self._device):
            return "sdpa", None
        if self._dtype.itemsize == 2 and find_spec("flash_attn") is not None:
            return "flash_attention_2", "transformers runs flash_attention_2"
        return "sdpa", "transformers runs sdpa, so its tower loops over windows in Python: flash-attn is not installed"

    @property
    def varlen_kernel(self) -> Callable | None:
        """A function that computes attention within groups of different lengths in one call, or None if torch lacks it here.

        The function takes queries, keys and values `[patches, heads, d]`, the cumulative group ends among queries and among keys
        (int32), the maximum number of queries and of keys in a group, and `scale`. It requires 16-bit floats and an Ampere or newer
        CUDA GPU.
        """
        half = self._dtype in (torch.bfloat16, torch.float16)
        if not uses_kernels(self._device) or torch.version.cuda is None or not half:
            return None
        is_old = torch.cuda.get_device_capability(self._device) < (8, 0)
        if is_old or not torch.backends.cuda.is_flash_attention_available():
            return None
        return attend_varlen

    def form_of_groups(self, by_length: Callable[[], T], packed: Callable[[Callable], T], padded: Callable[[], T]) -> T:
        """Return attention groups in the form that runs fastest on the device.

        Args:
            by_length: Creates the form for a CPU, which reads the lengths of the groups.
            packed: Creates the form for a kernel, which is passed as an argument (see `varlen_kernel`).
            padded: Creates the form for devices without such a kernel.
        """
        if is_host(self._device):
            return by_length()
        kernel = self.varlen_kernel
        return packed(kernel) if kernel else padded()

    def causal(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
    ) -> torch.Tensor | None:
        """Return causal attention for the last L of n columns, `[..., L, d]`, or None if no kernel can compute it without a mask.

        On CUDA, kernels without a mask are several times faster than kernels with a mask.

        Args:
            queries: `[..., heads, L, d]`.
            keys, values: `[..., heads, n, d]`.
            scale: The scale of the scores, or None for torch's default.
        """
        if queries.shape[2] == keys.shape[2]:
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        if not uses_kernels(self._device):
            return None
        # `torch.nn.attention.bias` calls the same operator, but imports all of torch.compile. The causal mask of flash attention is
        # aligned to the lower right corner, while torch's is aligned to the upper left. The check would therefore reject
        # is_causal=True, so it is used here only for shapes and dtypes.
        params = torch.backends.cuda.SDPAParams(queries, keys, values, None, 0.0, False, False)
        with as_current(self._device):  # the check queries the capability of the current device
            if not torch.backends.cuda.can_use_flash_attention(params) or queries.shape[3] % 8:
                return None
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(queries, keys, values, 0.0, True, False, scale=scale)[0]

    def bias_features(self, bias: torch.Tensor, dim: int, least: float = -math.inf) -> torch.Tensor:
        """Return additional key features `[n, e]`. Their product with ones adds `bias` to the attention scores of the keys.

        This is how a bias gets into kernels that accept no mask. Heads can have up to 256 features, in multiples of eight, so `e`
        is chosen to make `dim + e` a multiple of eight. The kernel divides scores by the square root of `dim`, so the bias is
        multiplied by it here. The bias is split into the sum of two numbers, because a single bf16 number could be off by 2^-9 of
        its value.

        Args:
            bias: float32 `[n]`, added to the scores of the keys.
            dim: The number of features of a head, without the additional ones.
            least: A lower bound. Smaller products are raised to it.
        """
        least = max(least, torch.finfo(self._dtype).min / 4)  # -inf times 0 would be NaN
        value = (bias * dim**0.5).clamp(min=least)
        high = value.to(self._dtype)
        return F.pad(torch.stack([high, (value - high.float()).to(self._dtype)], -1), (0, -(dim + 2) % 8))

    def room_for_bias(self, bias: torch.Tensor, columns: int, kv_heads: int, dim: int) -> torch.Tensor | None:
        """Allocate a buffer for a layer's keys and values, with room for features that carry a bias: `[2, kv_heads, n, dim + e]`.

        In the `e` additional features, keys get the result of `bias_features` and values get zeros. This allows kernels without a
        mask, because masks are slow on a GPU. Returns None if the device has no such kernels or if there is only one column. In
        these cases, callers apply the bias as a mask.

        Args:
            bias: float32 `[n]`, added to the scores of the keys.
            columns: The number of columns that have queries.
            kv_heads: The number of key/value heads.
            dim: The number of features of a head.
        """
        if columns == 1 or not uses_kernels(self._device):
            return None
        features = self.bias_features(bias, dim)
        room = features.new_zeros(2, kv_heads, len(features), dim + features.shape[1])
        room[0, :, :, dim:] = features
        return room


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
    """Compute the attention described in `Attention.varlen_kernel`.

    `torch.nn.attention.varlen` calls the same operator, but takes longer to import.
    """
    lengths = query_ends, key_ends, longest, most
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False, scale=scale)[0]
