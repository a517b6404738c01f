"""Patches for transformers attention layers that select keys with an indexer (Qwen4-Exp), so that masks can contain biases.

The indexer treats a key as hidden unless its mask is exactly 0. With a mask that contains biases for cluster sizes, it would
therefore miss most visual tokens. It also selects keys in a loop over all columns, even if it must select all of them.
"""

from functools import wraps

import torch

METHOD = "_evoprune_forward"


def accept_biases(model) -> None:
    """Permanently patch the classes of a model's indexers to accept masks with biases. Other models are not affected."""
    for kind in {type(part) for part in model.modules() if hasattr(part, "index_qk_proj")}:
        if not hasattr(kind.forward, METHOD):
            kind.forward = _accepting(kind.forward)


def _accepting(stock):
    @wraps(stock)
    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
        seen = attention_mask
        if seen.dtype != torch.bool:
            seen = seen > torch.finfo(seen.dtype).min / 2
        if seen.shape[-1] > self.token_budget or kwargs:
            return stock(self, hidden_states, position_embeddings, seen, cache, **kwargs)
        if cache is not None:  # all blocks are selected, but later columns still need these keys
            keys = self.index_qk_proj(hidden_states)[..., -self.index_head_dim :]
            cache.update_indexer(keys, self.layer_idx)
        return seen

    setattr(forward, METHOD, True)
    return forward
