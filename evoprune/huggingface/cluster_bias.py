"""The cluster-size bias inside a Hugging Face model: log(size) is added to the attention logits of each visual token.

In this project's own decoder, `language.decoder.forward` adds it. Here the model's own layers run, and the bias is part of the
attention mask that a call hands to them. So it belongs to that call: layers that are computed again for the gradient
(checkpointing) see the same, and other threads do not.
"""

import torch

from evoprune.huggingface import interface


def with_cluster_bias(model, call: dict, sizes: torch.Tensor) -> dict:
    """The call of `forward` in which attention weighs each column by its cluster size.

    Args:
        model: its attention takes masks of numbers (`interface.takes_numbers`).
        call: with `position_ids`.
        sizes: float32 `[B, C]`, of the prompt's columns; later columns have size 1. If the call has n * B rows (beams), each row
            of `sizes` applies to n neighbouring rows.
    """
    masks, shape, dtype = interface.attention_masks(model, call)
    bias = sizes.log().repeat_interleave(shape[0] // len(sizes), 0)
    weighted = {}
    for kind, mask in masks.items():
        first, keys = interface.first_key(model, call, kind), mask.shape[-1]
        of_keys = torch.nn.functional.pad(bias, (0, max(0, first + keys - bias.shape[1])))[:, first : first + keys]
        numbers = dtype if mask.dtype == torch.bool else mask.dtype
        weighted[kind] = _weighted(mask, of_keys[:, None, None].to(mask.device, numbers))
    alone = list(weighted) == [interface.ONLY_KIND] and not hasattr(model.config.text_config, "layer_types")
    return call | {"attention_mask": weighted[interface.ONLY_KIND] if alone else weighted}


def _weighted(mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The mask of numbers that has `bias` where `mask` lets a key be seen."""
    if mask.dtype == torch.bool:
        # Minus infinity, as sdpa has it for such a mask: a row that sees no key is then zero. The lowest finite number would make
        # it the mean of all values, of later columns too.
        return torch.where(mask, bias, -torch.inf)
    # Adding to a masked entry could overflow to minus infinity. In eager attention a row of those would be NaN.
    return torch.where(mask > torch.finfo(mask.dtype).min / 2, mask + bias, mask)
