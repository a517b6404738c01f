"""Building blocks for language model layers: RMS norm, projections to attention heads, and rotary embedding."""

import torch
import torch.nn.functional as F

from evoprune.model.config import head_size


def norm(x: torch.Tensor, weight: torch.Tensor, config) -> torch.Tensor:
    """Apply an RMS norm of the language model in float32.

    As in transformers, the normalized values are rounded before being multiplied by `weight`, whereas torch's own norm with a
    weight would round them after the multiplication. In models with Gated DeltaNets, they are multiplied by `weight` + 1, and then
    rounded.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        config: The language model config.

    Returns:
        `[..., D]`.
    """
    eps = config.rms_norm_eps
    if getattr(config, "delta_net", None) is None:
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight
    return F.rms_norm(x.float(), x.shape[-1:], weight.float() + 1, eps).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply a rotary embedding (arXiv 2104.09864), where paired features are half of the rotated features apart.

    Args:
        x: `[..., heads, head_dim]`.
        cos: Cosines, broadcastable to `x`, such as `[L, 1, head_dim]`. If they are narrower than `x`, only the leading features of
            each head are rotated.
        sin: Sines, of the same shape as `cos`. Their first half must be negated.
    """
    wide = cos.shape[-1]
    if wide < x.shape[-1]:
        return torch.cat([rotate(x[..., :wide], cos, sin), x[..., wide:]], -1)
    return x * cos + x.roll(wide // 2, -1) * sin


def heads_of(attention, name: str, x: torch.Tensor, config) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Project hidden states to queries, keys, or values, `[L, heads, head_dim]`, without applying the rotary embedding.

    Queries and keys are normalized per head if the layer has query and key norms.

    Args:
        attention: The attention module of a language model layer.
        name: "q", "k", or "v".
        x: The hidden states after the layer's norm, `[L, hidden]`.
        config: The language model config.

    Returns:
        The heads, and the gate of the attention's output, which has the same shape and is projected together with the queries. The
        gate is None for keys and values, and in models without gated attention.
    """
    projected = getattr(attention, f"{name}_proj")(x)
    dim = head_size(config)
    gate = None
    if name == "q" and getattr(config, "delta_net", None) is not None:
        projected, gate = projected.view(len(x), -1, 2 * dim).chunk(2, -1)
    else:
        projected = projected.view(len(x), -1, dim)
    of_heads = getattr(attention, f"{name}_norm", None)
    if of_heads is not None:
        projected = norm(projected, of_heads.weight, config)
    return projected, gate
