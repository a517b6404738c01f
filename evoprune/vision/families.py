"""Norm, MLP and rotary embedding of the towers' layers, rounded as in Hugging Face's code.

Qwen2.5-VL (arXiv 2502.13923) has RMS norms and gated MLPs. Qwen2-VL (arXiv 2409.12191) has layer norms with a bias, and MLPs of two
matrices with the quick GELU between them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.model.config import QWEN2, QWEN2_5, vision_sizes
from evoprune.model.linear import linear
from evoprune.pruning.indices import ascending
from evoprune.vision.layout import Geometry


@dataclass(frozen=True)
class Family:
    """What differs between towers: `norm(module, x)`, and `mlp(module, x, plus)`, which adds the MLP of normed `x` to `plus`."""

    norm: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    mlp: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def family(visual) -> Family:
    """The family of a tower, this project's or transformers'."""
    return FAMILIES[vision_sizes(visual.config).family]


def _rms(module, x: torch.Tensor) -> torch.Tensor:
    return norm(x, module.weight)


def _gated(mlp, x: torch.Tensor, plus: torch.Tensor) -> torch.Tensor:
    hidden = linear(mlp.up_proj, x, times=linear(mlp.gate_proj, x, silu=True))
    return linear(mlp.down_proj, hidden, plus=plus)


def _layer(module, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, module.weight.shape, module.weight, module.bias, 1e-6)


def _plain(mlp, x: torch.Tensor, plus: torch.Tensor) -> torch.Tensor:
    hidden = linear(mlp.fc1, x)
    hidden = hidden.mul_(torch.sigmoid(1.702 * hidden))  # the quick GELU
    return linear(mlp.fc2, hidden, plus=plus)


FAMILIES = {QWEN2_5: Family(_rms, _gated), QWEN2: Family(_layer, _plain)}


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm of rows `[..., D]`, in float32; on CPUs with fewer passes over the memory than F.rms_norm."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(x.shape[-1]).add_(1e-6).rsqrt_()
    return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)


def rotary(config, geo: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary embedding, float32 `[units, 4, head_dim]` each, by raster place.

    The first half of the sines is negated. One half of the angles depends on the patch's y, the other half on its x.
    """
    merge, quarter = config.spatial_merge_size, config.hidden_size // config.num_heads // 4
    speed = 10000.0 ** (torch.arange(quarter, dtype=torch.float32, device=geo.device) / -quarter)
    y, x = torch.meshgrid(ascending(geo.height, geo.device), ascending(geo.width, geo.device), indexing="ij")
    dy, dx = torch.meshgrid(ascending(merge, geo.device), ascending(merge, geo.device), indexing="ij")
    at = torch.stack([(y.flatten()[:, None] * merge + dy.flatten()), (x.flatten()[:, None] * merge + dx.flatten())], -1)
    angle = (at[..., None].float() * speed).flatten(2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` (`[R, 4, 2, heads, d]`) turned in float32 by `cos` and `sin` (float32 `[R, 4, 1, 1, d]`)."""
    wide = x.float()
    other = wide.roll(x.shape[-1] // 2, -1)
    return (wide * cos).addcmul_(other, sin).to(x.dtype)
