"""Layers in few operations: joined weights and fused kernels on CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from evoprune.backend import devices
from evoprune.backend.devices import has_triton, uses_kernels

TOGETHER = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}  # products of the same input
_apart: list[bool] = []


def join(model) -> None:
    """Puts weights that are multiplied with the same input behind each other in memory; each stays a layer of its own."""
    for layer in model.model.language_model.layers:
        for part, names in TOGETHER.items():
            module = layer.get_submodule(part)
            linears = [module.get_submodule(name) for name in names]
            if not all(map(is_unhooked_linear, linears)):
                continue
            rows = [linear.out_features for linear in linears]
            weight = torch.cat([linear.weight.detach() for linear in linears])
            bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
            for linear, piece in zip(linears, weight.split(rows), strict=True):
                linear.weight = torch.nn.Parameter(piece, requires_grad=False)
            module.joined = weight, bias


def join_tower(visual) -> None:
    """Puts the two first matrices of each gated MLP of a tower behind each other, and pads the inner size for fast products.

    3,420, the inner size of Qwen2.5-VL, is no multiple of 8: products with it take twice as long. Padding is zeros, which change
    nothing; each layer keeps its own weights as a view.
    """
    for block in visual.blocks:
        mlp = block.mlp
        linears = [getattr(mlp, name, None) for name in (*TOGETHER["mlp"], "down_proj")]
        if not all(linear is not None and is_unhooked_linear(linear) for linear in linears):
            continue
        gate, up, down = linears
        inner = gate.out_features
        wide = -(-inner // 32) * 32
        weight = gate.weight.new_zeros(2 * wide, gate.in_features)
        bias = gate.weight.new_zeros(2 * wide)
        mlp.wide_down = down.weight.new_zeros(down.out_features, wide)
        for linear, start in ((gate, 0), (up, wide)):
            weight[start : start + inner] = linear.weight.detach()
            bias[start : start + inner] = linear.bias.detach()
            linear.weight = torch.nn.Parameter(weight[start : start + inner], requires_grad=False)
        mlp.wide_down[:, :inner] = down.weight.detach()
        down.weight = torch.nn.Parameter(mlp.wide_down[:, :inner], requires_grad=False)
        mlp.joined = weight, bias


def joined(module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return the weights of `join` of a layer's attention or MLP; None if there are none, or a layer has others by now."""
    parameters = getattr(module, "joined", None)
    if parameters is None or _apart:
        return None
    first = module.q_proj if hasattr(module, "q_proj") else module.gate_proj
    if first.weight.data_ptr() != parameters[0].data_ptr():
        return None
    return parameters


def is_unhooked_linear(module: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer that has no hooks: whoever sets a hook wants to see its calls."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is torch.nn.Linear and not hooked


@contextmanager
def unjoined() -> Iterator[None]:
    """Provide a context in which products take each matrix by itself, as in a model of transformers."""
    _apart.append(True)
    try:
        yield
    finally:
        _apart.pop()


def kernels_for(device: torch.device) -> ModuleType | None:
    """Return the fused kernels for a device, `backend.kernels`; None where there are none, or one has failed."""
    if not uses_kernels(device) or devices.failed("layers") or not has_triton():
        return None
    from evoprune.backend import kernels

    return kernels


def give_up(problem: Exception) -> None:
    """Have layers compute without fused kernels from now on. Raises `problem` again if it is about memory."""
    devices.give_up("layers", "layers compute without fused kernels", problem)
