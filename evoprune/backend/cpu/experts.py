"""Mixtures of experts (MoE): a router chooses a few experts for each row, and the row is multiplied only by their weights.

Weights with 8 or 4 bits are multiplied by the compiled library, even in prompts, because each expert gets too few rows to make up
for packing or unpacking its weights. Only the chosen experts' weights are read. If they are memory-mapped, the others stay on disk.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from evoprune.backend.cpu import compiled
from evoprune.backend.cpu.linear import by_row

# The names of the matrices, `[experts, 2 * inner, hidden]` and `[experts, hidden, inner]`, as in transformers.
MATRICES = "gate_up_proj", "down_proj"
STEP = 32  # the compiled library requires that the sizes of weights are multiples of this

# Multiplies rows, `[R, in]`, by a matrix of an expert, given the name of the matrix and the number of the expert.
Product = Callable[[str, int, torch.Tensor], torch.Tensor]


def are_experts(module: nn.Module) -> bool:
    """Return True if a module contains the plain weights of a layer's experts, and its matrices are not hooked."""
    weights = [getattr(module, name, None) for name in MATRICES]
    plain = all(type(weight) is nn.Parameter and weight.ndim == 3 for weight in weights)
    return plain and not (module._forward_hooks or module._forward_pre_hooks)


def experts_output(experts: nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the output of a layer's experts, `[L, hidden]`. A row's result depends on other rows only through its products.

    Args:
        experts: The module with the experts' weights, plain or quantized.
        x: `[L, hidden]`.
        chosen: int64 `[L, n]`, the experts chosen for each row.
        weights: `[L, n]`, the output weight of each chosen expert.
    """
    if type(experts).forward is not nn.Module.forward:
        return experts(x, chosen, weights)
    return _output(partial(_plain_product, experts), x, chosen, weights)


def _plain_product(experts: nn.Module, name: str, number: int, rows: torch.Tensor) -> torch.Tensor:
    return F.linear(rows, getattr(experts, name)[number])


def _output(product: Product, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x, dtype=torch.float32)
    for number in chosen.unique().tolist():
        rows, place = (chosen == number).nonzero(as_tuple=True)
        gate, up = product("gate_up_proj", number, x[rows]).chunk(2, 1)
        new = product("down_proj", number, by_row(F.silu, gate) * up)
        out.index_add_(0, rows, new.float() * weights[rows, place, None])
    return out.to(x.dtype)


class QuantizedExperts(nn.Module):
    """The experts of a layer with 8-bit or 4-bit weights. Replaces the module in transformers models, too.

    Args:
        weights: The result of `experts_weights` in quantize.py.
        shapes: The shapes of the unquantized matrices, by name.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]):
        super().__init__()
        self.weights = dict(weights)
        self._lengths = {name: shape[-1] for name, shape in shapes.items()}
        sizes = [size for _, *shape in shapes.values() for size in shape]
        self.is_compiled = compiled.library() is not None and not any(size % STEP for size in sizes)

    @property
    def nbytes(self) -> int:
        """Memory used in addition to the layer's parameters and submodules, in bytes."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return _output(self._product, x, chosen, weights)

    def _product(self, name: str, number: int, rows: torch.Tensor) -> torch.Tensor:
        weights, scale = self.weights[name][number], self.weights[f"{name}_scale"][number]
        if not self.is_compiled:
            dequantized = (weights * scale[:, None]).to(rows.dtype)
            return by_row(lambda some: F.linear(some, dequantized), rows)
        scales = scale.data_ptr() if weights.dtype == torch.int8 else None  # 4-bit weights contain their scales
        pointers = weights.data_ptr(), scales, None, None, None
        return compiled.Linear(*pointers, 0, self._lengths[name], len(scale))(rows).to(rows.dtype)
