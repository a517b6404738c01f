"""The layers of a tower on CUDA in few operations: five products and four kernels a layer, where plain PyTorch has about 45.

It computes what `tower.run_layers` computes, for rows that attend to none of an earlier chunk and that nothing reduces or looks at.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from evoprune.backend.attention import varlen_kernel
from evoprune.backend.layers import give_up, joined, kernels
from evoprune.methods.plans import TowerShape
from evoprune.model.config import PATCHES, vision_sizes
from evoprune.vision.attention import Packed, plan_attention
from evoprune.vision.families import layers_of
from evoprune.vision.layout import Scope, TokenLayout

EPS = 1e-6


def can_fuse(x: torch.Tensor) -> bool:
    """Whether there are kernels for rows on this device, in this dtype."""
    return varlen_kernel(x.device, x.dtype) is not None and kernels(x.device) is not None


def run_layers(
    visual,
    tower: TowerShape,
    layers: range,
    x: torch.Tensor,
    layout: TokenLayout,
    table: tuple[torch.Tensor, torch.Tensor],
    piece: int | None,
    on_layer: Callable[[int, torch.Tensor], None],
) -> tuple[torch.Tensor, range]:
    """Rows `[R, 4, hidden]` after `layers`, and the layers that are left: none, unless a kernel fails.

    Args:
        table: cosines and sines of `tower.rotary`, by place. piece: rows that go through an MLP at a time, None for all.
        on_layer: called after each layer with its number and the rows `[R, 4, hidden]`.
    """
    shape, packed, normed = x.shape, {}, None
    x = x.flatten(0, 1)
    for layer in layers:
        try:
            scope: Scope = tower.scope(layer)
            if scope not in packed:
                packed[scope] = plan_attention(layout, scope, x, layout.reach != "place")
            after = visual.blocks[layer + 1].norm1 if layer + 1 in layers else None
            made = _layer(visual, visual.blocks[layer], x, normed, after, packed[scope], layout, table, piece)
        except Exception as problem:
            give_up(problem)
            return x.view(shape), range(layer, layers.stop)
        x, normed = made
        on_layer(layer, x.view(shape))
    return x.view(shape), range(0)


def _layer(
    visual,
    block: torch.nn.Module,
    x: torch.Tensor,
    normed: torch.Tensor | None,
    after: torch.nn.Module | None,
    packed: Packed,
    layout: TokenLayout,
    table: tuple[torch.Tensor, torch.Tensor],
    piece: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`x` (`[R * 4, hidden]`) after a layer, and that after the norm `after`; `normed`: `x` after this layer's first norm."""
    from evoprune.backend.kernels import rotate_into_groups

    if normed is None:
        x, normed = _add_norm(visual, x, None, block.norm1)
    heads = vision_sizes(visual.config).num_heads
    qkv, dim = block.attn.qkv(normed).view(layout.rows, PATCHES, -1), x.shape[1] // heads
    q, k, v = rotate_into_groups(qkv, *table, layout.place, heads, *packed.keys)
    mixed = packed.attend(q, k, v, scale=dim**-0.5)
    x, normed = _add_norm(visual, x, block.attn.proj(mixed[..., :dim].flatten(1)), block.norm2)
    made = [_mlp(visual, block.mlp, some) for some in normed.split(piece * PATCHES if piece else len(normed))]
    return _add_norm(visual, x, made[0] if len(made) == 1 else torch.cat(made), after)


def _add_norm(
    visual, x: torch.Tensor, plus: torch.Tensor | None, norm: torch.nn.Module | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum, and the sum after `norm`."""
    if norm is None:
        return x + plus, None
    if layers_of(visual).rms:
        return kernels(x.device).add_norm(x, plus, norm.weight, EPS)
    x = x if plus is None else x + plus
    return x, layers_of(visual).norm(norm, x)


def _mlp(visual, mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """An MLP without its residual, `[rows, hidden]`."""
    if found := joined(mlp):
        hidden = kernels(x.device).silu_times(F.linear(x, *found))
        return F.linear(hidden, mlp.wide_down, mlp.down_proj.bias)
    return layers_of(visual).mlp(mlp, x, None)
