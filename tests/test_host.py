"""What evoprune/host.py relies on, held against the transformers that is installed.

Where this fails, a release has changed something: read the new code before changing the line that fails here.
"""

import inspect

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

from evoprune import host
from tests.prompts import processed
from tests.tiny import tiny_model

FORWARD = [
    "self", "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache",
    "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "mm_token_type_ids", "second_per_grid_ts",
    "logits_to_keep", "mm_encoder_outputs", "kwargs",
]  # fmt: skip
GENERATE = [
    "self", "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
    "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "kwargs",
]  # fmt: skip
SIGNATURES = {
    Qwen2_5_VLForConditionalGeneration.forward: FORWARD,
    Qwen2_5_VLForConditionalGeneration.generate: GENERATE,
    Qwen2_5_VLForConditionalGeneration.get_image_features: ["self", "pixel_values", "image_grid_thw", "kwargs"],
    Qwen2_5_VLForConditionalGeneration.get_video_features: ["self", "pixel_values_videos", "video_grid_thw", "kwargs"],
    Qwen2_5_VLForConditionalGeneration._prepare_position_ids_for_generation: ["self", "inputs_tensor", "model_kwargs"],
    GenerationMixin.prepare_inputs_for_generation: [
        "self", "input_ids", "next_sequence_length", "past_key_values", "attention_mask", "inputs_embeds",
        "is_first_iteration", "kwargs",
    ],
    modeling.Qwen2_5_VLModel.compute_3d_position_ids: [
        "self", "input_ids", "image_grid_thw", "video_grid_thw", "inputs_embeds", "attention_mask", "past_key_values",
        "second_per_grid_ts", "mm_token_type_ids",
    ],
    modeling.Qwen2_5_VLModel.get_rope_index: [
        "self", "input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts",
        "attention_mask", "kwargs",
    ],
    Cache.get_seq_length: ["self", "layer_idx"],
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function):
    assert list(inspect.signature(function).parameters) == SIGNATURES[function]


def test_every_argument_for_vision_is_known():
    """One that came with a release would reach the model beside what was encoded here."""
    vision = [name for name in FORWARD if name.startswith(("pixel", "image", "video", "second"))]
    assert sorted(vision) == sorted(host.VISION_INPUTS)
    assert {host.ENCODED, *host.PER_COLUMN} < set(FORWARD)


def test_generate_goes_by_what_is_encoded_already():
    """Features that are not as many as the grids say, and positions in four rows, are taken as they are."""
    model = tiny_model()
    inputs = processed(model, (5, ("video", 1, 4, 4), 3))
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    features = torch.arange(128.0).view(2, 64)
    ids = torch.cat([inputs["input_ids"][:, :8], inputs["input_ids"][:, 10:]], 1)
    positions = torch.stack([torch.arange(12), *torch.arange(36).view(3, 12)])[:, None]
    out = modeling.BaseModelOutputWithPooling(pooler_output=[features])
    model.generate(ids, position_ids=positions, mm_encoder_outputs={"video": out}, max_new_tokens=2, do_sample=False)
    hook.remove()
    assert torch.equal(seen[0]["inputs_embeds"][0, 6:8], features)
    assert torch.equal(seen[0]["position_ids"], positions)
    assert seen[1]["position_ids"].flatten().tolist() == [12, 12, 24, 36]


def test_a_generation_setting_is_found_where_generate_finds_it():
    model = tiny_model()
    model.generation_config.max_length, model.generation_config.pad_token_id = 50, None
    model.generation_config.eos_token_id = [7, 8]
    config = type(model.generation_config)(max_length=40)
    assert host.setting(model, {}, "max_length") == 50
    assert host.setting(model, {"generation_config": config}, "max_length") == 40
    assert host.setting(model, {"generation_config": config, "max_length": 30}, "max_length") == 30
    assert host.setting(model, {"generation_config": type(config)()}, "max_length") == 50
    assert host.pad_id(model, {}) == 7 and host.pad_id(model, {"pad_token_id": 3}) == 3
