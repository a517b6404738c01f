"""Checks that the installed transformers behaves as evoprune/hf/interface.py assumes.

If one of these tests fails, a release changed something: read the new code before changing the failing line.
"""

import inspect

import pytest
import torch
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

import evoprune
from evoprune.hf import interface
from tests.hf.reference import TAKES_ENCODED
from tests.prompts import CACHE, processed
from tests.tiny import tiny_model

FORWARD = [
    "self", "input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "labels", "use_cache",
    "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "mm_token_type_ids", "second_per_grid_ts",
    "logits_to_keep", *(["mm_encoder_outputs"] if TAKES_ENCODED else []), "kwargs",
]  # fmt: skip
GENERATE = [
    "self", "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
    "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "kwargs",
]  # fmt: skip
POSITIONS = "_prepare_position_ids_for_generation"
# The other families have the parameters of Qwen2.5-VL, except the seconds.
OTHERS = [
    (Qwen2_5_VLForConditionalGeneration, name, other)
    for other in (Qwen2VLForConditionalGeneration, Qwen3VLForConditionalGeneration)
    for name in ("forward", "generate", *(f"get_{kind}_features" for kind in ("image", "video")), POSITIONS)
] + [
    (modeling.Qwen2_5_VLModel, name, other)
    for other in (qwen2.Qwen2VLModel, qwen3.Qwen3VLModel)
    for name in ("compute_3d_position_ids", "get_rope_index")
]
SIGNATURES = {
    Qwen2_5_VLForConditionalGeneration.forward: FORWARD,
    Qwen2_5_VLForConditionalGeneration.generate: GENERATE,
    Qwen2_5_VLForConditionalGeneration.get_image_features: ["self", "pixel_values", "image_grid_thw", "kwargs"],
    Qwen2_5_VLForConditionalGeneration.get_video_features: ["self", "pixel_values_videos", "video_grid_thw", "kwargs"],
    Qwen2_5_VLForConditionalGeneration._prepare_position_ids_for_generation: ["self", "inputs_tensor", "model_kwargs"],
    GenerationMixin.prepare_inputs_for_generation: [
        "self", "input_ids", "next_sequence_length", CACHE, "attention_mask", "inputs_embeds",
        "is_first_iteration", "kwargs",
    ],
    modeling.Qwen2_5_VLModel.compute_3d_position_ids: [
        "self", "input_ids", "image_grid_thw", "video_grid_thw", "inputs_embeds", "attention_mask", CACHE,
        "second_per_grid_ts", "mm_token_type_ids",
    ],
    modeling.Qwen2_5_VLModel.get_rope_index: [
        "self", "input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts",
        "attention_mask", "kwargs",
    ],
    Cache.get_seq_length: ["self", "layer_idx"],
    Cache.get_mask_sizes: ["self", "query_length", "layer_idx"],
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures_are_the_known_ones(function):
    assert list(inspect.signature(function).parameters) == SIGNATURES[function]


@pytest.mark.parametrize(("known", "name", "other"), OTHERS, ids=lambda x: getattr(x, "__name__", x))
def test_signatures_of_the_other_families_differ_in_the_seconds(known, name, other):
    given = set(inspect.signature(getattr(other, name)).parameters) | {"use_cache"}  # Qwen3-VL has it among `kwargs`
    assert given == {*SIGNATURES[getattr(known, name)], "use_cache"} - {"second_per_grid_ts"}


def test_every_argument_for_vision_is_known():
    """A new argument would reach the model in addition to the features that evoprune has encoded."""
    vision = [name for name in FORWARD if name.startswith(("pixel", "image", "video", "second"))]
    assert sorted(vision) == sorted(interface.VISION_INPUTS)
    assert set(interface.PER_COLUMN) - {"shift_labels"} < set(FORWARD)


def test_generate_takes_encoded_videos_and_positions_as_they_are():
    """This also holds with fewer features than video_grid_thw implies, and with positions in four rows."""
    model = tiny_model()
    inputs = processed(model, (5, ("video", 1, 4, 4), 3))
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    features = torch.arange(128.0).view(2, 64)
    ids = torch.cat([inputs["input_ids"][:, :8], inputs["input_ids"][:, 10:]], 1)
    positions = torch.stack([torch.arange(12), *torch.arange(36).view(3, 12)])[:, None]
    interface.accept_features(model)
    encoded = interface.encoded_inputs(model, {}, [(features, None)])
    model.generate(ids, position_ids=positions, **encoded, max_new_tokens=2, do_sample=False)
    hook.remove()
    assert torch.equal(seen[0]["inputs_embeds"][0, 6:8], features)
    assert torch.equal(seen[0]["position_ids"], positions)
    assert seen[1]["position_ids"].flatten().tolist() == [12, 12, 24, 36]


def test_qwen3_is_refused_before_it_is_pruned_where_transformers_takes_no_encoded_videos(monkeypatch):
    monkeypatch.setattr(interface, "takes_encoded", lambda model: False)
    monkeypatch.setattr(interface, "version", {"transformers": "5.17.0"}.get)
    for use in (evoprune.EvoPrune(budget=1.0), evoprune.apply):
        with pytest.raises(
            evoprune.UsageError, match=r"^transformers 5\.17\.0 does not accept encoded videos of Qwen3-VL"
        ) as caught:
            use(tiny_model(family="qwen3_vl"))
        assert caught.value.hint == "use transformers 5.20 or later"
    other = tiny_model()
    other.config.vision_config.deepstack_visual_indexes = ()
    kind = type(other.model)
    # evoprune replaces it, and monkeypatch restores it
    monkeypatch.setattr(kind, "get_video_features", kind.get_video_features)
    evoprune.EvoPrune(budget=1.0)(other)


def test_generation_settings_have_generates_precedence():
    model = tiny_model()
    own = model.generation_config
    own.max_length, own.pad_token_id, own.eos_token_id = 50, None, [7, 8]
    config = type(own)(max_length=40)
    for call, length in (
        ({}, 50),
        ({"generation_config": config}, 40),
        ({"generation_config": config, "max_length": 30}, 30),
        ({"generation_config": type(config)()}, 50),
    ):
        assert interface.setting(model, call, "max_length") == length
    assert interface.pad_id(model, {}) == 7 and interface.pad_id(model, {"pad_token_id": 3}) == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", ["full_attention", "sliding_attention"])
def test_attention_adds_a_mask_of_numbers(attention, layers):
    """A column of size two is the same as two equal columns."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    text = model.config.text_config
    text.layer_types, text.sliding_window = ["full_attention", layers], 8
    model.model.language_model.has_sliding_layers = layers == "sliding_attention"
    assert interface.accepts_float_mask(model)
    embeds = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    twice, at = embeds[:, [0, 1, 1, 2, 3]], torch.tensor([0, 1, 1, 2, 3])
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    seen[1, 2] = True  # the two attend to each other, as a column of size two attends to itself twice
    mask = torch.zeros(5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    call = {"inputs_embeds": embeds, "position_ids": torch.arange(4).expand(4, 1, -1)}
    with torch.no_grad():
        expected = model.model.language_model(
            inputs_embeds=twice, position_ids=at.expand(4, 1, -1), attention_mask=mask
        ).last_hidden_state[:, [0, 1, 3, 4]]
        made = model.model.language_model(**interface.with_cluster_bias(model, call, torch.tensor([[1.0, 2.0, 1.0]])))
    torch.testing.assert_close(made.last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [CACHE, interface.OLD_CACHE_NAME])
def test_a_cache_is_found_by_its_new_and_its_old_name(name):
    cache = DynamicCache()
    assert interface.cache_of({"cache": None, name: cache}) is cache
    assert interface.cache_of({name: None}) is None


def test_a_sliding_cache_drops_the_first_keys():
    model = tiny_model()
    text = model.config.text_config
    text.layer_types, text.sliding_window = ["full_attention", "sliding_attention"], 3
    cache = DynamicCache(config=text)
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), layer)
    call = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 6), CACHE: cache}
    sizes = torch.arange(1.0, 6.0)[None]
    masks = interface.with_cluster_bias(model, call, sizes)["attention_mask"]
    later = torch.tensor([1.0])
    assert torch.equal(masks["full_attention"].flatten().exp(), torch.cat([sizes[0], later]).log().exp())
    assert torch.equal(masks["sliding_attention"].flatten().exp(), torch.cat([sizes[0, 3:], later]).log().exp())
