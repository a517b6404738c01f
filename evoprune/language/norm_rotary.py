"""RMS norm and rotary embedding of the language model, rounded where Hugging Face rounds them."""

from functools import lru_cache

import torch
import torch.nn.functional as F


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm in float32, rounded before it is scaled, as in Hugging Face. torch would scale before it rounds."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


@lru_cache
def _frequencies(theta: float, sections: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of features: radians per position, float32 `[head_dim / 2]`, and which of the three positions, int64."""
    dim = 2 * sum(sections)
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    axes = [axis for axis, size in enumerate(sections) for _ in range(size)]
    return frequencies, torch.tensor(axes, dtype=torch.int64, device="cpu")


def rotation(config, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[L, 1, head_dim]` in dtype and on the device of `like`; the sines' first half is negated."""
    rope = config.rope_parameters
    frequencies, axis = _frequencies(rope["rope_theta"], tuple(rope["mrope_section"]))
    angles = (positions[axis].T * frequencies).to(like.device)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each feature of `[..., heads, head_dim]` with the one half a head away (arXiv 2104.09864)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
