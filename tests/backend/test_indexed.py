"""Qwen4-Exp's indexers accept masks that contain biases for cluster sizes, and select the same keys as in transformers."""

import pytest
import torch

from evoprune.backend.indexed import METHOD, accept_biases
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def text():
    model = tiny_model(family="qwen4_exp")
    accept_biases(model)
    accept_biases(model)  # a second time changes nothing
    return model.model.language_model


def selected(text, masks, columns, **budget):
    """For each mask, return the keys that the first indexer selects for random columns, and the state of its cache."""
    from transformers import DynamicCache

    indexer = next(part for part in text.modules() if hasattr(part, "index_qk_proj"))
    x = torch.randn(1, columns, text.config.hidden_size, generator=torch.Generator().manual_seed(0))
    turns = text.rotary_emb(x, torch.arange(columns).expand(3, 1, -1))
    for name, value in budget.items():
        setattr(indexer, name, value)
    for mask in masks:
        cache = DynamicCache(config=text.config)
        yield indexer(x, turns, mask, cache), cache.layers[indexer.layer_idx].indexer_keys


@pytest.mark.parametrize("columns", [11, 64, 65, 90])
@torch.inference_mode()
def test_the_same_keys_with_and_without_biases(text, columns):
    causal = torch.ones(columns, columns, dtype=torch.bool).tril()[None, None]
    sizes = torch.arange(1, columns + 1).float()
    biased = torch.where(causal, sizes.log(), -torch.inf)
    lowest = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    kind = type(next(part for part in text.modules() if hasattr(part, "index_qk_proj")))
    patched = kind.forward
    assert getattr(patched, METHOD) and not hasattr(patched.__wrapped__, METHOD)
    kind.forward = patched.__wrapped__
    try:
        ((expected, keys),) = selected(text, [causal], columns)
        ((wrong, _),) = selected(text, [biased], columns)
    finally:
        kind.forward = patched
    assert not wrong.equal(expected)  # transformers would hide all columns with a bias
    for mine, own in selected(text, [causal, biased, lowest], columns):
        assert (mine & causal).equal(expected & causal) and own.allclose(keys, atol=1e-6)
    assert bool((expected & causal).equal(causal)) == (columns <= 64 + 3)
