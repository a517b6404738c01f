"""Compare the estimated costs of every family with measurements of its model in transformers."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evoprune.model.config import FAMILIES, QWEN3_5, QWEN3_5_MOE, QWEN4, Config, head_size
from evoprune.model.cost import DELTA_CHUNK, Cost, _mlp_size
from evoprune.model.weights import QwenVL
from evoprune.session import BUNDLED_CONFIGS
from evoprune.session.loading.hosted import hugging_face_config
from tests.prompts import CACHE
from tests.tiny import tiny_config, tiny_model

TINY = {family: Config.parse(tiny_config(family).to_dict()) for family in FAMILIES}
BUNDLED = {name: Config.parse(json.loads(path.read_text())) for name, path in BUNDLED_CONFIGS.items()}

PREDICTING = "Qwen/Qwen3.5-", "Qwen/Qwen3.6-", "Qwen/Qwen3.8-27B"  # published with a layer for multi-token prediction


def ids_for(text, columns):
    return {"ple_input_ids": torch.arange(columns)[None]} if text.reads_ids else {}


@pytest.mark.few(6)
@pytest.mark.parametrize("name", [*TINY, *BUNDLED])
def test_parameters_are_those_of_transformers(name):
    from transformers import AutoModelForImageTextToText

    config = (TINY | BUNDLED)[name]
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(hugging_face_config(config))
    theirs.tie_weights()
    # transformers has no layer for multi-token prediction
    without_mtp = replace(config, text_config=replace(config.text_config, mtp_num_hidden_layers=0))
    assert Cost(without_mtp).parameters == sum(weight.numel() for weight in theirs.parameters())
    if FAMILIES[config.vision_config.family].native:
        assert Cost(config).parameters == sum(weight.numel() for weight in QwenVL.empty(config).parameters())
    assert (Cost(config).parameters > Cost(without_mtp).parameters) is name.startswith(PREDICTING)


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_a_prompt_are_those_of_transformers(family):
    config, n = TINY[family].text_config, 2 * DELTA_CHUNK
    model = tiny_model(family=family)
    model.set_attn_implementation("eager")  # uses matrix products that the counter sees
    model.set_experts_implementation("eager")
    language = model.model.language_model
    embeds = torch.randn(1, n, config.hidden_size)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        language(inputs_embeds=embeds, **ids_for(config, n))
    # And the output layer for the last column.
    expected = counter.get_total_flops() + 2 * config.hidden_size * config.vocab_size
    depth = config.num_hidden_layers
    full = sum(not config.is_linear(layer) for layer in range(depth))
    # The counter assumes that every column attends to every column, which is twice as much.
    expected -= full * 2 * n * n * head_size(config) * config.num_attention_heads
    if net := config.delta_net:  # the triangular systems, which the counter misses
        solved = DELTA_CHUNK * (net.linear_key_head_dim + net.linear_value_head_dim) * net.linear_num_value_heads
        expected += (depth - full) * n * solved
    # Before transformers 5.20 the counter includes the products of the rotary frequencies.
    flop = Cost(TINY[family]).prefill_flop
    assert flop(n) == pytest.approx(expected, rel=3e-4)
    assert flop([n] * depth) == flop([(n, n, n)] * depth) == flop(n)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_cache_are_those_of_transformers(family):
    from transformers import DynamicCache

    config, model = TINY[family], tiny_model(family=family).model.language_model
    for n in (7, 70):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(
                inputs_embeds=torch.randn(1, n, 64),
                **{CACHE: cache},
                use_cache=True,
                **ids_for(config.text_config, n),
            )
        held = []
        for layer in cache.layers:
            held += (
                [*layer.conv_states.values(), *layer.recurrent_states.values()] if hasattr(layer, "conv_states") else []
            )
            held += [layer.indexer_keys] if hasattr(layer, "indexer_keys") else []
            held += [layer.keys, layer.values] if getattr(layer, "keys", None) is not None else []
        depth = config.text_config.num_hidden_layers
        kv_bytes = Cost(config).kv_bytes
        assert kv_bytes(n, 4) == kv_bytes([n] * depth, 4) == sum(each.nbytes for each in held if each is not None)


@pytest.mark.parametrize("family", [QWEN3_5, QWEN3_5_MOE, QWEN4])
def test_only_attention_grows_with_the_prompt(family):
    cost, text = Cost(TINY[family]), TINY[family].text_config
    grown = cost.kv_bytes(100, 2) - cost.kv_bytes(50, 2)
    indexed = text.qwen4.indexer_head_dim if text.qwen4 else 0
    assert grown == 2 * 50 * (2 * text.num_key_value_heads * head_size(text) + indexed) * 2 and cost.kv_bytes(0) > 0
    assert cost.language_bytes(200, 2) > cost.language_bytes(100, 2) > cost.kv_bytes(100, 2)


def test_a_token_goes_through_some_experts():
    text = TINY[QWEN3_5_MOE].text_config
    assert _mlp_size(text, 0) == 2 * 32 + 48
    text = TINY["qwen3_vl_moe"].text_config
    assert [_mlp_size(text, layer) for layer in range(3)] == [64, 128, 64]
