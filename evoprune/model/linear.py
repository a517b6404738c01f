"""Linear layers fused with the operation that follows; on the CPU, their weights are packed once.

PyTorch's plain CPU product rearranges the whole weight matrix in every call. Packed layers rearrange it once. That saves most
for products with a single row, which decoding consists of (`python -m experiments.kernels`). The operators are those that
torch.compile uses; where this torch has none, layers are not packed.
"""

import torch
import torch.nn.functional as F
from torch import nn

# The number of rows that packing assumes. From a few dozen rows up, the arrangement does not depend on it.
ROWS = 512


class PackedLinear(nn.Module):
    """A linear layer on the CPU with weights in the order that the matrix product reads. The plain weights are not kept."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.bias = layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds beside its parameters."""
        return self.packed.numel() * self.packed.element_size()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def linear(
    layer: nn.Module,
    x: torch.Tensor,
    *,
    silu: bool = False,
    times: torch.Tensor | None = None,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """`layer(x)`, followed by at most one of: SiLU, a product with `times`, a sum with `plus`.

    Args:
        layer: any module that maps `[..., in]` to `[..., out]`.
        x: `[..., in]`.
        times, plus: `[..., out]`.
    """
    if isinstance(layer, PackedLinear):
        if silu:
            return torch.ops.mkldnn._linear_pointwise(x, layer.packed, layer.bias, "swish", [], "")
        if times is not None or plus is not None:
            other, how = (times, "mul") if plus is None else (plus, "add")
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, layer.packed, layer.bias, how)
        return layer(x)
    y = layer(x)
    if silu:
        return F.silu(y)
    if times is not None:
        return y * times
    return y if plus is None else y + plus


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all weights as the model holds them (packed, quantised). Shared weights count once."""
    return sum(weight.nbytes for weight in model.parameters()) + sum(
        getattr(module, "nbytes", 0) for module in model.modules()
    )


def can_pack(weight: torch.Tensor) -> bool:
    """Whether packing works and saves time: on the CPU, in a dtype that it multiplies in hardware, with this torch."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def pack(model: nn.Module) -> None:
    """Replaces the linear layers inside `model` by packed ones, one at a time. The plain weights are freed."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(parent, name, PackedLinear(child))
