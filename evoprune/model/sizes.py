"""Sizes that follow from a model's config alone. Imports no torch."""

from collections.abc import Sequence

from evoprune.model.config import Config

PATCHES = 4  # of a unit: 2x2
ANSWER_COLUMNS = 256  # that a prompt's KV cache has to spare: an answer of the usual length needs no second cache


def kv_bytes(config: Config, tokens: int | Sequence[int], bytes_each: int = 2) -> int:
    """Bytes of the language model's keys and values for a prompt.

    Args:
        tokens: of the prompt, in each layer or in all.
        bytes_each: of a number; 2 for bf16.
    """
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    every = text.num_hidden_layers * tokens if isinstance(tokens, int) else sum(tokens)
    return 2 * text.num_key_value_heads * head * every * bytes_each
