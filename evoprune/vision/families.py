"""Vision tower layers for each model family, with the same rounding as the Hugging Face implementation.

Qwen2.5-VL (arXiv 2502.13923) uses RMS norms and gated MLPs. Qwen2-VL (arXiv 2409.12191) uses layer norms with a bias, and MLPs made
up of two linear layers with quick GELU in between. Qwen3-VL (arXiv 2511.21631) resembles Qwen2-VL, but its MLPs use the tanh
approximation of GELU. It also adds learned position embeddings to the patches and outputs features from inner layers (DeepStack,
arXiv 2406.04334). Qwen3.5 and Qwen4-Exp use the tower of Qwen3-VL without the features from inner layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.backend import linear
from evoprune.model import VisionConfig
from evoprune.vision.layout import Geometry

EPS = 1e-6  # epsilon of all norms


@dataclass(frozen=True)
class Layers:
    """A model family's functions for computing the norms and the MLP of a layer.

    `norm(module, x)` applies a norm to `x`. `mlp(module, x, plus)` applies an MLP to `x`, which must already be normalized, and
    then adds `plus` unless it is None.
    """

    norm: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    mlp: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor | None], torch.Tensor]
    rms: bool = False  # whether the norms are RMS norms instead of layer norms


def tower_layers(visual) -> Layers:
    """Return the layer functions for a vision tower, which may be this project's `Tower` or a transformers module."""
    return LAYERS[VisionConfig.of(visual.config).traits.hidden_act]


def _gated(mlp, x: torch.Tensor, plus: torch.Tensor | None) -> torch.Tensor:
    hidden = linear(mlp.up_proj, x, times=linear(mlp.gate_proj, x, silu=True))
    return linear(mlp.down_proj, hidden, plus=plus)


def _layer(module, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, module.weight.shape, module.weight, module.bias, EPS)


def _quick_gelu(mlp, x: torch.Tensor, plus: torch.Tensor | None) -> torch.Tensor:
    hidden = linear(mlp.fc1, x)
    hidden = hidden.mul_(torch.sigmoid(1.702 * hidden))
    return linear(mlp.fc2, hidden, plus=plus)


def _tanh_gelu(mlp, x: torch.Tensor, plus: torch.Tensor | None) -> torch.Tensor:
    return linear(mlp.linear_fc2, F.gelu(linear(mlp.linear_fc1, x), approximate="tanh"), plus=plus)


LAYERS = {  # by activation
    "silu": Layers(lambda module, x: norm(x, module.weight), _gated, rms=True),
    "quick_gelu": Layers(_layer, _quick_gelu),
    "gelu_pytorch_tanh": Layers(_layer, _tanh_gelu),
}


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Apply an RMS norm to `x` (`[..., D]`) with scales in float32, or in float64 if `x` is.

    On CPUs, this makes fewer passes over memory than F.rms_norm.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
    scale = length.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
    return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)


def embed(visual, patches: torch.Tensor, geo: Geometry, unit: torch.Tensor) -> torch.Tensor:
    """Embed patches (`[R, 4, values]`) of the given units (`unit`, int64 `[R]`). Returns `[R, 4, hidden]`."""
    proj = visual.patch_embed.proj
    x = F.linear(patches, proj.weight.flatten(1), proj.bias)
    if VisionConfig.of(visual.config).num_position_embeddings is None:
        return x
    return x + learned_positions(visual.pos_embed.weight, geo)[unit % geo.units].to(x.dtype)


def learned_positions(table: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """Interpolate a square table of learned position embeddings to the patches of a frame pair (bilinear, with aligned corners).

    Args:
        table: `[side * side, hidden]`.

    Returns:
        float32 `[units, 4, hidden]`, in raster order.
    """
    side = math.isqrt(len(table))
    wide = table.shape[1]
    positions = table.float().view(side, side, wide)
    positions = _resampled(_resampled(positions, 2 * geo.height).transpose(0, 1), 2 * geo.width).transpose(0, 1)
    return positions.reshape(geo.height, 2, geo.width, 2, wide).transpose(1, 2).reshape(geo.units, 4, wide)


def _resampled(x: torch.Tensor, count: int) -> torch.Tensor:
    """Interpolate `x` (`[side, ...]`) linearly to `count` entries (at least 2), leaving the first and last entries unchanged."""
    at = torch.arange(count, dtype=torch.float32, device=x.device) * (len(x) - 1) / (count - 1)
    low = at.floor().long().clamp(max=len(x) - 2)
    return torch.lerp(x[low], x[low + 1], (at - low).view(-1, *[1] * (x.ndim - 1)))


def merger_norm(visual) -> torch.Tensor:
    """Return the weights of the norm in the patch merger."""
    return visual.merger.get_submodule(VisionConfig.of(visual.config).traits.merger[0]).weight


def merge_patches(visual, x: torch.Tensor, number: int | None = None) -> torch.Tensor:
    """Apply the patch merger to the last layer's output rows (`[R, 4, hidden]`). Returns the tokens, `[R, D]`.

    If `number` is not None, the rows come from an inner layer, and the DeepStack merger with this index is used instead. The
    language model adds that merger's output after its own layer with the same index. Some model families apply the merger's norm to
    each patch, and others to the concatenated patches, as determined from the width of the norm.
    """
    merger = visual.merger
    if number is not None:
        merger = visual.deepstack_merger_list[number]
    before, first, second = map(merger.get_submodule, VisionConfig.of(visual.config).traits.merger)
    if before.weight.shape[0] != x.shape[-1]:
        x = x.flatten(1)
    x = tower_layers(visual).norm(before, x).flatten(1)
    return linear(second, F.gelu(linear(first, x)))
