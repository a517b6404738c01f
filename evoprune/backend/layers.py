"""Reduces the number of operations per layer by joining weight matrices and, on CUDA, using fused kernels."""

from types import ModuleType

import torch

from evoprune.backend.devices import failed, has_triton, uses_kernels

# For each module type, the linear layers inside it that share an input.
SHARED_INPUT = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def join(model) -> None:
    """Join language model weight matrices that share an input into one contiguous tensor.

    Each linear layer's weight becomes a view into the joined tensor.
    """
    for layer in model.model.language_model.layers:
        for part, names in SHARED_INPUT.items():
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
    """Join the first two matrices of every gated MLP in the vision tower, and pad the inner dimension to speed up matrix products.

    The MLPs of Qwen2.5-VL have an inner dimension of 3,420. Because this isn't a multiple of 8, matrix products take twice as long
    as they should. It is padded to a multiple of 32 with zeros, which don't change the results. Each linear layer's weight becomes
    a view into the padded tensors.
    """
    for block in visual.blocks:
        mlp = block.mlp
        linears = [getattr(mlp, name, None) for name in (*SHARED_INPUT["mlp"], "down_proj")]
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
    """Return the joined weight and bias that `join` or `join_tower` created for an attention or MLP module.

    Returns None if the module has no joined weights, or if its weights have since been replaced.
    """
    parameters = getattr(module, "joined", None)
    if parameters is None:
        return None
    first = module.q_proj if hasattr(module, "q_proj") else module.gate_proj
    if first.weight.data_ptr() != parameters[0].data_ptr():
        return None
    return parameters


def is_unhooked_linear(module: torch.nn.Module) -> bool:
    """Return True if a module is a plain linear layer without hooks. Layers with hooks must be called so that the hooks run."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is torch.nn.Linear and not hooked


def kernels_for(device: torch.device) -> ModuleType | None:
    """Return the fused kernel module, or None if the device doesn't support fused kernels or if one has failed before."""
    if not uses_kernels(device) or failed("layers") or not has_triton():
        return None
    from evoprune.backend import kernels

    return kernels
