"""Norm and rotary embedding of the tower's rows, rounded as in Hugging Face's code."""

import torch

from evoprune.pruning.indices import ascending
from evoprune.vision.layout import Geometry


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm of rows `[..., D]`, in float32 and rounded before scaling as in Hugging Face's code.

    On CPUs it needs fewer passes over the memory than F.rms_norm.
    """
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
    """Applies the rotary embedding in float32, as in Hugging Face's code.

    Args:
        x: `[R, 4, 2, heads, d]`. cos, sin: float32 `[R, 4, 1, 1, d]`.

    Returns:
        `[R, 4, 2, heads, d]`, in the dtype of `x`.
    """
    wide = x.float()
    other = wide.roll(x.shape[-1] // 2, -1)
    return (wide * cos).addcmul_(other, sin).to(x.dtype)
