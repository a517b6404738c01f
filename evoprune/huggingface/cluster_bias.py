"""The cluster-size bias inside a Hugging Face model: log(size) is added to the attention logits of each visual token.

In this project's own decoder, `language.decoder.forward` adds it. Here the model's own layers run, so a hook before the
attention of each layer adds the bias to the attention mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from evoprune.huggingface import interface


@contextmanager
def cluster_bias(model, sizes: torch.Tensor | None) -> Iterator[None]:
    """While the context lasts, attention weighs each column by its cluster size.

    Args:
        model: a Hugging Face `Qwen2_5_VL-` or `Qwen2VLForConditionalGeneration` whose attention takes masks of numbers
            (`interface.takes_numbers`).
        sizes: float32 `[B, C]`, the cluster sizes of the prompt's columns; later columns have size 1. None for 1 everywhere.
            If the model runs n * B rows (beams), each row of `sizes` applies to n neighbouring rows.
    """
    if sizes is None:
        yield
        return
    bias = sizes.log()

    def add_bias(attention, args: tuple, call: dict) -> tuple[tuple, dict]:
        states, mask, cache = call["hidden_states"], call.get("attention_mask"), call.get("past_key_values")
        rows, columns = states.shape[:2]
        if mask is None:  # causal attention: every column attends to all columns before it
            layer = attention.layer_idx
            keys, seen = (
                (columns, 0)
                if cache is None
                else (cache.get_mask_sizes(columns, layer)[0], cache.get_seq_length(layer))
            )
            mask = torch.ones(columns, keys, dtype=torch.bool, device=states.device).tril(int(seen))[None, None]
        if mask.dtype == torch.bool:
            least = torch.finfo(states.dtype).min
            mask = torch.zeros(mask.shape, dtype=states.dtype, device=mask.device).masked_fill(~mask, least)
        keys = mask.shape[-1]
        added = bias.to(mask)[:, :keys].repeat_interleave(rows // len(bias), 0)
        added = torch.nn.functional.pad(added, (0, keys - added.shape[1]))[:, None, None]
        # Adding to a masked entry could overflow to minus infinity, and a row of those would be NaN.
        return args, call | {"attention_mask": torch.where(mask > torch.finfo(mask.dtype).min / 2, mask + added, mask)}

    hooks = [layer.register_forward_pre_hook(add_bias, with_kwargs=True) for layer in interface.attention_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
