"""Selects the fastest attention implementation for each device, both for prompts and for patch groups.

The cuDNN backend is never used on CUDA because it can spend seconds planning for each new shape.
"""

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Self, TypeVar

import torch
import torch.nn.functional as F

from evoprune.backend.devices import as_current, is_host, uses_kernels
from evoprune.util import overlapping

T = TypeVar("T")

# With at least this many keys, the attention scores no longer fit into the CPU cache, so the fused kernel is faster than two matrix
# products. On a 2688x2688 image (36,864 patches), it takes a third of the time.
LONG = 4096


@overlapping
def without_cudnn() -> Iterator[None]:
    """Prevent `scaled_dot_product_attention` from choosing cuDNN. Works as a context manager and as a decorator.

    Torch's setting applies to the whole process.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Attention:
    """Selects the fastest attention implementation for a given device and dtype.

    Args:
        device: The device of the queries, keys, and values.
        dtype: The dtype of the queries, keys, and values.
    """

    # Some kernels can't handle an infinite bias, so hidden keys get a weight of e^-NEVER instead.
    NEVER = 1000.0

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device = device
        self._dtype = dtype

    @classmethod
    def of(cls, x: torch.Tensor) -> Self:
        """Return the `Attention` for a tensor's device and dtype."""
        return cls(x.device, x.dtype)

    def prefers_products(self, keys: int) -> bool:
        """Return True if two matrix products with materialized scores are faster than a fused attention kernel.

        This is the case for bf16 on a CPU with fewer than `LONG` keys.
        """
        return is_host(self._device) and self._dtype == torch.bfloat16 and keys < LONG

    def of_transformers(self) -> tuple[str, str | None]:
        """Return the name of the fastest transformers attention implementation on this device, plus a note for reports.

        The fastest implementation is flash-attn if installed; otherwise, torch's SDPA. The note describes how the transformers
        vision tower runs with this implementation. On a CPU, the note is None.
        """
        if is_host(self._device):
            return "sdpa", None
        if self._dtype.itemsize == 2 and find_spec("flash_attn") is not None:
            return "flash_attention_2", "transformers runs flash_attention_2"
        return "sdpa", "transformers runs sdpa, so its tower loops over windows in Python: flash-attn is not installed"

    @property
    def varlen_kernel(self) -> Callable | None:
        """A kernel that computes attention within variable-length groups in a single call, or None if unsupported.

        The kernel takes queries, keys, and values (each `[patches, heads, d]`), the cumulative group ends for the queries and for
        the keys (int32), the maximum number of queries and of keys per group, and `scale`. It requires 16-bit floats and an Ampere
        or newer CUDA GPU.
        """
        half = self._dtype in (torch.bfloat16, torch.float16)
        if not uses_kernels(self._device) or torch.version.cuda is None or not half:
            return None
        is_old = torch.cuda.get_device_capability(self._device) < (8, 0)
        if is_old or not torch.backends.cuda.is_flash_attention_available():
            return None
        return attend_varlen

    def form_of_groups(self, by_length: Callable[[], T], packed: Callable[[Callable], T], padded: Callable[[], T]) -> T:
        """Create attention groups in the fastest layout for the device.

        Args:
            by_length: Creates groups for the CPU, where group lengths can be read.
            packed: Creates groups for a variable-length kernel, which is passed as its argument (see `varlen_kernel`).
            padded: Creates padded groups for devices without a variable-length kernel.

        Returns:
            The result of whichever function was called.
        """
        if is_host(self._device):
            return by_length()
        kernel = self.varlen_kernel
        return packed(kernel) if kernel else padded()

    def causal(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
    ) -> torch.Tensor | None:
        """Compute maskless causal attention for the last L of n columns, if possible.

        On CUDA, kernels without a mask are several times faster than kernels with one.

        Args:
            queries: `[..., heads, L, d]`.
            keys, values: `[..., heads, n, d]`.
            scale: Scale factor for the scores, or None for torch's default.

        Returns:
            `[..., heads, L, d]`, or None if no kernel can compute this attention without a mask.
        """
        if queries.shape[2] == keys.shape[2]:
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        if not uses_kernels(self._device):
            return None
        # `torch.nn.attention.bias` calls the same operator, but importing it imports all of torch.compile. Flash attention aligns
        # the causal mask to the lower right corner, whereas torch aligns it to the upper left corner. Torch's check would therefore
        # reject is_causal=True for these shapes, so we pass False and use the check only for the shapes and dtypes themselves.
        params = torch.backends.cuda.SDPAParams(queries, keys, values, None, 0.0, False, False)
        with as_current(self._device):  # the check queries the capability of the current device
            if not torch.backends.cuda.can_use_flash_attention(params) or queries.shape[3] % 8:
                return None
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(queries, keys, values, 0.0, True, False, scale=scale)[0]

    def bias_features(self, bias: torch.Tensor, dim: int, least: float = -math.inf) -> torch.Tensor:
        """Return extra key features, `[n, e]`, that add a bias to the scores in kernels without mask support.

        The queries are filled with ones in the extra features, so the dot product of a query and a key includes the key's bias.
        Kernels support head dimensions up to 256 in multiples of eight, so `e` is chosen to make `dim + e` a multiple of eight. The
        kernel divides the scores by the square root of `dim`, so the bias is premultiplied by that square root. The result is
        stored as the sum of two numbers because a single bf16 number can have a relative error of up to 2^-9.

        Args:
            bias: float32 `[n]`, the bias to add to each key's scores.
            dim: The head dimension, not counting the extra features.
            least: Lower bound for the premultiplied bias. Smaller values are clamped to it.
        """
        least = max(least, torch.finfo(self._dtype).min / 4)  # -inf times 0 would be NaN
        value = (bias * dim**0.5).clamp(min=least)
        high = value.to(self._dtype)
        return F.pad(torch.stack([high, (value - high.float()).to(self._dtype)], -1), (0, -(dim + 2) % 8))

    def room_for_bias(self, bias: torch.Tensor, columns: int, kv_heads: int, dim: int) -> torch.Tensor | None:
        """Allocate a buffer for a layer's keys and values, with extra features that apply a bias.

        The extra key features are set to the result of `bias_features`, and the extra value features to zero. With this buffer,
        attention doesn't need a mask, which would be slow on a GPU.

        Args:
            bias: float32 `[n]`, the bias to add to each key's scores.
            columns: The number of query columns.
            kv_heads: The number of key/value heads.
            dim: The head dimension, not counting the extra features.

        Returns:
            `[2, kv_heads, n, dim + e]`, or None if the device has no suitable kernel or if there is only one column. In that case,
            the caller applies the bias as a mask.
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
    """Compute attention within variable-length groups (see `Attention.varlen_kernel` for the arguments).

    `torch.nn.attention.varlen` calls the same operator, but takes longer to import.
    """
    lengths = query_ends, key_ends, longest, most
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False, scale=scale)[0]
