"""Patches the indexer-based attention layers of Qwen4-Exp to support biases in their masks.

In transformers, the indexer treats a key as hidden unless its mask value is exactly 0, so it would ignore most visual tokens if the
mask contained cluster-size biases. It also loops over all columns to select their keys, even when every key has to be selected.
"""

from functools import wraps

import torch

METHOD = "_evoprune_forward"


def accept_biases(model) -> None:
    """Permanently patch a model's indexer classes to accept masks with biases. Models without indexers are left unchanged."""
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
        if cache is not None:  # this call selects all blocks, but later columns still need the indexer keys
            keys = self.index_qk_proj(hidden_states)[..., -self.index_head_dim :]
            cache.update_indexer(keys, self.layer_idx)
        return seen

    setattr(forward, METHOD, True)
    return forward
