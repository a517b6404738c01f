"""Chooses the fastest way to compute attention on each device, both for prompts and for groups of patches.

cuDNN's attention is never used on CUDA, because it can spend seconds on planning for each new shape.
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

# With at least this many keys, the attention scores no longer fit into the CPU cache, so the fused kernel is faster than two matrix
# products. For an image of 2688x2688 pixels (36,864 patches), it takes a third of the time.
LONG = 4096

_lock = threading.Lock()
_active = 0  # the number of active `without_cudnn` contexts
_setting_before = False


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Keep `scaled_dot_product_attention` from choosing cuDNN. Works as a context manager and as a decorator.

    Torch's setting applies to the whole process. The first thread to enter the context saves the setting, and the last thread to
    leave it restores the setting.
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
    """Chooses the fastest attention implementation for a device and a dtype.

    Args:
        device: The device of the queries, keys and values.
        dtype: The dtype of the queries, keys and values.
    """

    # For kernels that cannot handle an infinite bias, a key is hidden by giving it a weight of e^-NEVER.
    NEVER = 1000.0

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device = device
        self._dtype = dtype

    @classmethod
    def of(cls, x: torch.Tensor) -> Self:
        """Return the `Attention` for the device and dtype of a tensor."""
        return cls(x.device, x.dtype)

    def prefers_products(self, keys: int) -> bool:
        """Return True if attention is faster as two matrix products, with the scores held in memory, than as a fused kernel.

        This is the case for bf16 on a CPU if there are fewer than `LONG` keys.
        """
        return is_host(self._device) and self._dtype == torch.bfloat16 and keys < LONG

    def of_transformers(self) -> tuple[str, str | None]:
        """Return the name of transformers' fastest attention implementation on this device, and a note about it for reports.

        The fastest implementation is flash-attn if it is installed, otherwise torch's SDPA. The note says how the vision tower of
        transformers runs with this implementation. On a CPU, the note is None.
        """
        if is_host(self._device):
            return "sdpa", None
        if self._dtype.itemsize == 2 and find_spec("flash_attn") is not None:
            return "flash_attention_2", "transformers runs flash_attention_2"
        return "sdpa", "transformers runs sdpa, so its tower loops over windows in Python: flash-attn is not installed"

    @property
    def varlen_kernel(self) -> Callable | None:
        """A kernel that computes attention within groups of different lengths in a single call, or None if unsupported.

        The kernel takes queries, keys and values (each `[patches, heads, d]`), the cumulative ends of the groups among the
        queries and among the keys (int32), the maximum numbers of queries and keys in a group, and `scale`. It requires 16-bit
        floats and a CUDA GPU of the Ampere generation or newer.
        """
        half = self._dtype in (torch.bfloat16, torch.float16)
        if not uses_kernels(self._device) or torch.version.cuda is None or not half:
            return None
        is_old = torch.cuda.get_device_capability(self._device) < (8, 0)
        if is_old or not torch.backends.cuda.is_flash_attention_available():
            return None
        return attend_varlen

    def form_of_groups(self, by_length: Callable[[], T], packed: Callable[[Callable], T], padded: Callable[[], T]) -> T:
        """Create attention groups in the layout for which attention is fastest on the device.

        Args:
            by_length: Creates groups for the CPU, where the lengths of the groups can be read.
            packed: Creates groups for a kernel that handles groups of different lengths. It receives that kernel as its argument
                (see `varlen_kernel`).
            padded: Creates padded groups for devices that have no such kernel.

        Returns:
            The result of the one function that was called.
        """
        if is_host(self._device):
            return by_length()
        kernel = self.varlen_kernel
        return packed(kernel) if kernel else padded()

    def causal(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
    ) -> torch.Tensor | None:
        """Compute causal attention for the last L of n columns, without a mask if possible.

        On CUDA, kernels that need no mask are several times faster than kernels with a mask.

        Args:
            queries: `[..., heads, L, d]`.
            keys, values: `[..., heads, n, d]`.
            scale: The scale factor for the scores. None means torch's default.

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
        """Return additional key features, `[n, e]`, that add a bias to the scores in kernels that do not accept a mask.

        The queries have ones in the additional features, so the dot product of a query and a key includes the key's bias. Kernels
        support heads with up to 256 features, in multiples of eight, so `e` is chosen to make `dim + e` a multiple of eight.
        Because the kernel divides the scores by the square root of `dim`, the bias is multiplied by that root here. The result is
        stored as the sum of two numbers, because a single bf16 number could be off by 2^-9 of its value.

        Args:
            bias: float32 `[n]`, the bias to add to each key's scores.
            dim: The number of features in a head, not counting the additional ones.
            least: A lower bound for the multiplied bias. Values below it are raised to it.
        """
        least = max(least, torch.finfo(self._dtype).min / 4)  # -inf times 0 would be NaN
        value = (bias * dim**0.5).clamp(min=least)
        high = value.to(self._dtype)
        return F.pad(torch.stack([high, (value - high.float()).to(self._dtype)], -1), (0, -(dim + 2) % 8))

    def room_for_bias(self, bias: torch.Tensor, columns: int, kv_heads: int, dim: int) -> torch.Tensor | None:
        """Allocate a buffer for the keys and values of a layer, with additional features that apply a bias.

        The additional features of the keys are filled with the result of `bias_features`, and those of the values with zeros. With
        this buffer, attention needs no mask, which would be slow on a GPU.

        Args:
            bias: float32 `[n]`, the bias to add to each key's scores.
            columns: The number of columns for which queries are computed.
            kv_heads: The number of key/value heads.
            dim: The number of features in a head, not counting the additional ones.

        Returns:
            `[2, kv_heads, n, dim + e]`, or None if the device has no kernel for this or if there is only one column. The caller
            then applies the bias as a mask.
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
    """Compute attention within groups of different lengths (see `Attention.varlen_kernel` for the arguments).

    `torch.nn.attention.varlen` calls the same operator, but takes longer to import.
    """
    lengths = query_ends, key_ends, longest, most
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False, scale=scale)[0]
