"""Causal attention of a prompt on CUDA, where a kernel without a mask is several times faster than one with a mask."""

import torch
import torch.nn.functional as F

from evoprune.backend.fallback import uses_kernels


def causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
) -> torch.Tensor | None:
    """Attention of the last L of n columns, by heads, `[..., L, d]`; None where there is no kernel for it without a mask."""
    if queries.shape[2] == keys.shape[2]:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
    if not uses_kernels(queries.device):
        return None
    # Not `torch.nn.attention.bias`, which calls the same and imports the whole of torch.compile. Flash attention's "causal" ends at
    # the lower right; the check is of shapes and types, and refuses "causal" because that of torch begins at the upper left.
    params = torch.backends.cuda.SDPAParams(queries, keys, values, None, 0.0, False, False)
    if not torch.backends.cuda.can_use_flash_attention(params) or queries.shape[3] % 8:
        return None
    return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, True, False, scale=scale)[0]
