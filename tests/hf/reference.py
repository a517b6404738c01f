"""Inputs for a stock model that give the same result as a pruned model: the whole prompt, with the dropped columns masked."""

import inspect
from contextlib import contextmanager

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

import evoprune
from evoprune.hf import interface
from evoprune.model import FAMILIES
from tests.prompts import CACHE, TIME_TOKENS

TAKES_ENCODED = "mm_encoder_outputs" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters
ONCE = {"method": "evoprune:count=0"}  # every token counts once


def skip_where_not_taken(model):
    """Skip tests with a model whose encoded videos this transformers version cannot take."""
    if not TAKES_ENCODED and getattr(model.config.vision_config, "deepstack_visual_indexes", None):
        pytest.skip("transformers before 5.18 takes no encoded videos of Qwen3-VL")


def encoded(model, inputs, budget, how=ONCE, pictures=False):
    pixels, grids = ("pixel_values", "image_grid_thw") if pictures else ("pixel_values_videos", "video_grid_thw")
    return evoprune.encode(model, inputs[pixels], inputs[grids], budget=budget, **how)


def seconds_of(inputs):
    """Return every video's seconds per frame pair; 1.0 for Qwen2-VL, whose processor returns none."""
    seconds = inputs.get("second_per_grid_ts")
    return [1.0] * len(inputs["video_grid_thw"]) if seconds is None else seconds.tolist()


def masked(model, inputs, videos, pictures=None):
    """Return the whole prompt, with features for kept units and a mask that excludes the columns of dropped units.

    `videos` and `pictures` are results of `encoded`, or None if there are no videos or if images are not pruned.
    """
    call = {name: value for name, value in inputs.items() if not name.startswith("pixel") and not name.endswith("_thw")}
    known = {name: value for name, value in inputs.items() if not name.startswith(("pixel", "input"))}
    call["position_ids"] = model._prepare_position_ids_for_generation(inputs["input_ids"], known)
    features = {}
    for kind, made in (("video", videos), ("image", pictures)):
        if made is None:
            continue
        sizes = (inputs[f"{kind}_grid_thw"].prod(-1) // 4).tolist()
        columns = inputs["input_ids"] == getattr(model.config, f"{kind}_token_id")
        dropped = torch.ones(len(made.unit_to_row), dtype=torch.bool).index_fill(0, made.kept, False)
        leaves = torch.zeros_like(columns).masked_scatter(columns, dropped)
        if kind == "video" and FAMILIES[model.config.model_type].timestamps:
            leaves = with_empty_pairs(model, inputs["input_ids"], leaves)
        call["attention_mask"] = call["attention_mask"].masked_fill(leaves, 0)
        features[kind] = tower_output(made, sizes)
    whole = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs and pictures is None}
    if not TAKES_ENCODED:  # transformers before 5.18
        interface.accept_features(model)
        videos = [(each, None) for each in features["video"].pooler_output]
        return call | interface.encoded_inputs(model, call | whole, videos)
    if whole:
        features["image"] = model.get_image_features(*whole.values())
    return call | {"mm_encoder_outputs": features}


def tower_output(made, sizes):
    """Return the output of transformers' tower for inputs of `sizes` units: features of kept units, arbitrary values for others."""
    of_layers = [made.features, *(() if made.deepstack is None else made.deepstack)]
    whole = torch.full((len(made.unit_to_row), made.features.shape[1]), 7.0)
    features, *inner = (whole.index_copy(0, made.kept, each).split(sizes) for each in of_layers)
    if not inner:
        return BaseModelOutputWithPooling(pooler_output=features)
    return BaseModelOutputWithDeepstackFeatures(pooler_output=features, deepstack_features=inner)


def with_empty_pairs(model, ids, dropped):
    """Extend `dropped` by the timestamp and marker columns around each frame pair whose tokens are all dropped."""
    leaves = dropped.clone()
    for row, prompt in enumerate(ids.tolist()):
        starts = [i + 1 for i, token in enumerate(prompt) if token == model.config.vision_start_token_id]
        for start in (start for start in starts if prompt[start] == model.config.video_token_id):
            end = prompt.index(model.config.vision_end_token_id, start)
            if dropped[row, start:end].all():
                leaves[row, start - 1 - TIME_TOKENS : end + 1] = True
    return leaves


def sizes_of(model, inputs, made):
    """Return the cluster size that attention assumes for each column of the whole prompt."""
    if made.size is None:
        return None
    video = inputs["input_ids"] == model.config.video_token_id
    units = torch.ones(len(made.unit_to_row)).index_copy(0, made.kept, made.size)
    return torch.ones(video.shape).masked_scatter(video, units)


@contextmanager
def weighed_by(model, sizes):
    """Add log(sizes) (`[B, C]`, None for 1) to the mask of the keys in every attention layer of the model, with hooks."""
    layers = [] if sizes is None else [layer.self_attn for layer in model.model.language_model.layers]

    def add_bias(attention, args, call):
        states, mask, cache = call["hidden_states"], call.get("attention_mask"), call.get(CACHE)
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
