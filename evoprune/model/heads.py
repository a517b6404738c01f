"""Queries, keys and values of a layer of the language model: RMS norm, projections per head, rotary embedding."""

import torch
import torch.nn.functional as F

from evoprune.model.config import head_size


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Apply an RMS norm in float32, rounded before it is scaled, as in Hugging Face. torch would scale before it rounds."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each feature of `[..., heads, head_dim]` with the one half a head away (arXiv 2104.09864)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def heads_of(attention, name: str, x: torch.Tensor, config) -> torch.Tensor:
    """Return queries, keys or values ("q", "k", "v") of normed `x` (`[L, hidden]`), before rotary: `[L, heads, head_dim]`.

    `attention`: of a layer of the language model. Its queries and keys are normed head by head where it has such norms.
    """
    projected = getattr(attention, f"{name}_proj")(x).view(len(x), -1, head_size(config))
    of_heads = getattr(attention, f"{name}_norm", None)
    if of_heads is not None:
        projected = norm(projected, of_heads.weight, config.rms_norm_eps)
    return projected
