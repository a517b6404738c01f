"""The cluster-size bias added to a stock model from outside, for comparison."""

from contextlib import contextmanager

import torch


@contextmanager
def weighed_by(model, sizes):
    """While the context lasts, hooks before each attention add log(sizes) (`[B, C]`, None for 1) to the mask of its keys."""
    layers = [] if sizes is None else [layer.self_attn for layer in model.model.language_model.layers]

    def add_bias(attention, args, call):
        states, mask, cache = call["hidden_states"], call.get("attention_mask"), call.get("past_key_values")
        rows, columns = states.shape[:2]
        if mask is None:  # causal attention: every column attends to all columns before it
            layer = attention.layer_idx
            keys, seen = (
                (columns, 0)
                if cache is None
                else (cache.get_mask_sizes(columns, layer)[0], cache.get_seq_length(layer))
            )
            mask = torch.ones(columns, keys, dtype=torch.bool).tril(int(seen))[None, None]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=states.dtype).masked_fill(~mask, -torch.inf)
        bias = sizes.log().to(mask)[:, : mask.shape[-1]].repeat_interleave(rows // len(sizes), 0)
        bias = torch.nn.functional.pad(bias, (0, mask.shape[-1] - bias.shape[1]))[:, None, None]
        return args, call | {"attention_mask": torch.where(mask > torch.finfo(mask.dtype).min / 2, mask + bias, mask)}

    hooks = [layer.register_forward_pre_hook(add_bias, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
