"""Attention layers of transformers that select keys with an indexer (Qwen4-Exp), for masks with biases.

The indexer takes every key whose mask is not exactly 0 for hidden. A mask with the biases of cluster sizes would hide most visual
tokens from it. It also selects keys in a loop over all columns, even if it has to select all of them.
"""

from functools import wraps

import torch

METHOD = "_evoprune_forward"


def accept_biases(model) -> None:
    """Patch the classes of a model's indexers, permanently, to accept masks with biases. Other models stay unchanged."""
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
        if cache is not None:  # all blocks are selected, but later columns need these keys
            keys = self.index_qk_proj(hidden_states)[..., -self.index_head_dim :]
            cache.update_indexer(keys, self.layer_idx)
        return seen

    setattr(forward, METHOD, True)
    return forward
