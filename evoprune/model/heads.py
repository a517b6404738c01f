"""Building blocks for language model layers: RMS norm, projections to attention heads, and rotary embedding."""

import torch
import torch.nn.functional as F

from evoprune.model.config import head_size


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Apply an RMS norm in float32.

    As in transformers, the normalized values are rounded before being multiplied by `weight`, whereas torch's own norm with a
    weight would round them after the multiplication.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        eps: Added to the mean square.

    Returns:
        `[..., D]`.
    """
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply a rotary embedding (arXiv 2104.09864) to `[..., heads, head_dim]`, with paired features half a head apart.

    Args:
        x: `[..., heads, head_dim]`.
        cos: Cosines, broadcastable to `x`, such as `[L, 1, head_dim]`.
        sin: Sines, of the same shape as `cos`. Their first half must be negated.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def heads_of(attention, name: str, x: torch.Tensor, config) -> torch.Tensor:
    """Project hidden states to queries, keys, or values, `[L, heads, head_dim]`, without applying the rotary embedding.

    Queries and keys are normalized per head if the layer has query and key norms.

    Args:
        attention: The attention module of a language model layer.
        name: "q", "k", or "v".
        x: The hidden states after the layer's norm, `[L, hidden]`.
        config: The language model config.
    """
    projected = getattr(attention, f"{name}_proj")(x).view(len(x), -1, head_size(config))
    of_heads = getattr(attention, f"{name}_norm", None)
    if of_heads is not None:
        projected = norm(projected, of_heads.weight, config.rms_norm_eps)
    return projected
