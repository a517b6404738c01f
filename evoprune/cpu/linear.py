"""Linear layers fused with the operation that follows; on the CPU, their weights are packed once.

PyTorch's plain CPU product rearranges the whole weight matrix in every call. Packed layers rearrange it once. That saves most
for products with a single row, which decoding consists of (`python -m experiments.kernels`). With many rows the plain product
is as fast, so a layer can wait with packing until few rows come: the first word is there before. The operators are those that
torch.compile uses; where this torch has none, layers are not packed.
"""

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from evoprune.backend.devices import available_memory, is_host
from evoprune.backend.layers import is_plain
from evoprune.cpu.machine import madvise_cold

# The number of rows that packing assumes. From a few dozen rows up, the arrangement does not depend on it.
ROWS = 512
# From so many rows on, plain and packed weights give the same numbers equally fast: above it products are not split along the
# inner dimension. Products with small weights are split nevertheless, but packing these takes no time.
MANY_ROWS = 256
SMALL_WEIGHT = 2**21
SPARE = 2**28  # bytes that packing leaves free


@dataclass
class PackingTime:
    seconds: float = 0.0  # that layers which share this have packed their weights


class PackedLinear(nn.Module):
    """A linear layer on the CPU with weights in the order that the matrix product reads. The plain weights are not kept.

    `spent`: None packs at once. Else a layer that is not small packs when it is first called with few rows, unless memory is short
    then, and adds the seconds here. Until then it computes with the plain weights.
    """

    def __init__(self, layer: nn.Linear, spent: PackingTime | None = None):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.bias = layer.bias
        # The weights, and whether they stay as they are. One attribute, because several threads may run a model.
        waits = spent is not None and layer.weight.numel() > SMALL_WEIGHT
        self._held = (layer.weight.detach(), False) if waits else (_packed(layer.weight), True)
        self._spent = spent

    @property
    def nbytes(self) -> int:
        """Bytes that it holds beside its parameters."""
        return self._held[0].numel() * self._held[0].element_size()

    @property
    def waits(self) -> bool:
        """Whether the weights are still plain, to be packed when few rows come."""
        return not self._held[1]

    def weights_for(self, x: torch.Tensor) -> torch.Tensor:
        """The weights, plain or packed, for a product with `x`, `[..., in]`."""
        weights, final = self._held
        if final or x.numel() >= MANY_ROWS * self.in_features:
            return weights
        start = time.perf_counter()
        available = available_memory("cpu")
        if available is None or available > self.nbytes + SPARE:
            plain, weights = weights, _packed(weights)
            madvise_cold(plain)  # a file's pages may count against a container's memory
        self._held = weights, True
        self._spent.seconds += time.perf_counter() - start
        return weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weights_for(x), self.bias, "none", [], "")


def _packed(weight: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):  # or it could not be used outside of it later
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def linear(
    layer: nn.Module,
    x: torch.Tensor,
    *,
    silu: bool = False,
    times: torch.Tensor | None = None,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """`layer(x)`, followed by at most one of: SiLU, a product with `times`, a sum with `plus` (`[..., out]`).

    `layer`: any module that maps `[..., in]` to `[..., out]`.
    """
    if isinstance(layer, PackedLinear):
        if silu:
            return torch.ops.mkldnn._linear_pointwise(x, layer.weights_for(x), layer.bias, "swish", [], "")
        if times is not None or plus is not None:
            operand, operation = (times, "mul") if plus is None else (plus, "add")
            return torch.ops.mkldnn._linear_pointwise.binary(x, operand, layer.weights_for(x), layer.bias, operation)
        return layer(x)
    y = layer(x)
    if silu:
        return F.silu(y)
    if times is not None:
        return y * times
    return y if plus is None else y + plus


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all weights as the model holds them (packed, quantised). Shared weights count once."""
    inside = sum(getattr(module, "nbytes", 0) for module in model.modules())
    return inside + sum(weight.nbytes for weight in model.parameters())


def can_pack(weight: torch.Tensor) -> bool:
    """Whether packing works and saves time: on the CPU, in a dtype that it multiplies in hardware, with this torch."""
    if not is_host(weight.device) or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    if type(weight.data) is not torch.Tensor:  # of a library that holds it in fewer bits, as torchao does
        return False
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    operators = "_reorder_linear_weight", "_linear_pointwise"
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def pack(model: nn.Module, spent: PackingTime | None = None) -> None:
    """Replaces the linear layers inside `model` by packed ones, one at a time. The plain weights are freed.

    `spent`: None packs now; else all but small layers pack when they are called with few rows, and add up the seconds here.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(parent, name, PackedLinear(child, spent))


def packed_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` in which linear layers are packed; it shares everything else, and nothing changes in `module`."""
    return shared_copy(module, lambda layer: PackedLinear(layer) if packs(layer) else None)


def shared_copy(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of a tree of modules on the same weights. `replace`: what stands for a module in it; None for a copy."""
    if (replacement := replace(module)) is not None:
        return replacement
    clone = copy(module)
    clone._modules = {name: child and shared_copy(child, replace) for name, child in module.named_children()}
    return clone


def packs(module: nn.Module) -> bool:
    """Whether `packed_copy` packs this module."""
    return is_plain(module) and can_pack(module.weight)
