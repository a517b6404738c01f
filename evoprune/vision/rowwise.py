"""What a layer of the tower does to each row by itself: norm and rotary embedding, as Hugging Face rounds them."""

import torch

from evoprune.vision.layout import Geometry


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm in float32, rounded before it is scaled, as Hugging Face has it; in fewer passes than F.rms_norm on CPUs."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(x.shape[-1]).add_(1e-6).rsqrt_()
    return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)


def rotary(config, geo: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[units, 4, head_dim]` in float32, by raster place; the first half of the sines is negated. Half of the pairs
    turn with a patch's row, half with its column."""
    merge, quarter = config.spatial_merge_size, config.hidden_size // config.num_heads // 4
    speed = 10000.0 ** (torch.arange(quarter) / -quarter)
    y, x = torch.meshgrid(torch.arange(geo.height), torch.arange(geo.width), indexing="ij")
    dy, dx = torch.meshgrid(torch.arange(merge), torch.arange(merge), indexing="ij")
    at = torch.stack([(y.flatten()[:, None] * merge + dy.flatten()), (x.flatten()[:, None] * merge + dx.flatten())], -1)
    angle = (at[..., None].float() * speed).flatten(2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in float32, as Hugging Face has it: x `[R, 4, 2, heads, d]`, cos and sin `[R, 4, 1, 1, d]`."""
    wide = x.float()
    other = wide.roll(x.shape[-1] // 2, -1)
    return (wide * cos).addcmul_(other, sin).to(x.dtype)
