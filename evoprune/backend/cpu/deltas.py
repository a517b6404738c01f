"""The gated delta rule, computed by the compiled library. See `Quantization.delta_rule`."""

import torch

from evoprune.backend.cpu.compiled import library


def delta_rule(
    qk: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read columns one after another using a Gated DeltaNet (arXiv 2412.06464, section 3).

    Args:
        qk: Queries and keys, float32 `[2, L, key_heads, key_dim]`.
        v: Values, `[L, value_heads, value_dim]`.
        decay: The factor of the state in each column, `[L, value_heads]`.
        beta: The share of each column to write, `[L, value_heads]`.
        state: The state before the columns, float32 `[value_heads, key_dim, value_dim]`, where value_dim is a multiple of 8.

    Returns:
        What the queries read, float32 `[L, value_heads, value_dim]`, and the state after the columns.
    """
    q, k, v, decay, beta = (each.float().contiguous() for each in (*qk, v, decay, beta))
    state = state.clone(memory_format=torch.contiguous_format)
    y = torch.empty_like(v)
    addresses = (each.data_ptr() for each in (q, k, v, decay, beta, state, y))
    sizes = *q.shape[:2], *state.shape
    library().evoprune_delta_rule(*addresses, *sizes, torch.get_num_threads())
    return y, state
