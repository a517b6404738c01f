"""Building blocks of language model layers: RMS norm, projections to heads, rotary embedding."""

import torch
import torch.nn.functional as F

from evoprune.model.config import head_size


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Apply an RMS norm in float32. The result is rounded before scaling, as in Hugging Face; torch would round after scaling."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply a rotary embedding to `[..., heads, head_dim]`, pairing features that are half a head apart (arXiv 2104.09864)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def heads_of(attention, name: str, x: torch.Tensor, config) -> torch.Tensor:
    """Return queries, keys or values before the rotary embedding, `[L, heads, head_dim]`.

    Queries and keys are normalized per head if the layer has norms for them.

    Args:
        attention: The attention module of a language model layer.
        name: "q", "k" or "v".
        x: The normalized columns, `[L, hidden]`.
        config: The config of the language model.
    """
    projected = getattr(attention, f"{name}_proj")(x).view(len(x), -1, head_size(config))
    of_heads = getattr(attention, f"{name}_norm", None)
    if of_heads is not None:
        projected = norm(projected, of_heads.weight, config.rms_norm_eps)
    return projected
