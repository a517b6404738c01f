"""Attention of a Hugging Face model counts some columns more than once: what it masks its keys with is added to on the way in.

`decoder.forward` does the same for this project's own decoder. Here the model's layers run by themselves, so hooks before the
attention of each put the logarithms of the counts into the mask that it is given.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from evoprune.huggingface import interface


@contextmanager
def counting(model, counts: torch.Tensor | None) -> Iterator[None]:
    """Meanwhile attention counts columns as often as is said.

    Args:
        model: a Hugging Face `Qwen2_5_VL-` or `Qwen2VLForConditionalGeneration`, under an attention that takes masks of numbers
            (`interface.takes_numbers`).
        counts: float32 `[B, C]`, of the prompt's columns; those behind count once. None for one each. Where the model runs more
            rows than B, as with beams, each stands for so many neighbouring ones.
    """
    if counts is None:
        yield
        return
    bias = counts.log()

    def count(attention, args: tuple, call: dict) -> tuple[tuple, dict]:
        states, mask, cache = call["hidden_states"], call.get("attention_mask"), call.get("past_key_values")
        rows, columns = states.shape[:2]
        if mask is None:  # then there is nothing that a column may not see but what comes after it
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
        # Twice the least would be minus infinity, and a row of nothing else not a number.
        return args, call | {"attention_mask": torch.where(mask > torch.finfo(mask.dtype).min / 2, mask + added, mask)}

    hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in interface.attention_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
