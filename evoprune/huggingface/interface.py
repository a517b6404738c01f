"""All that is relied upon of Hugging Face's Qwen2.5-VL and Qwen2-VL, beside their weights.

tests/test_host.py says it a second time, and fails where a release of transformers has changed it.
"""

from collections.abc import Iterator, Sequence

import torch

from evoprune.errors import ModelError
from evoprune.language.positions import VideoSpan, prompt_positions
from evoprune.model.config import check_vision, vision_sizes

SUPPORTED = (
    "supported are transformers' Qwen2_5_VLForConditionalGeneration and Qwen2VLForConditionalGeneration; take it out of "
    "what wraps it (PEFT: get_base_model(), torch.compile: _orig_mod)"
)
# Arguments of `forward` that go with videos and pictures. Once those are encoded it must not see them any more.
VISION_INPUTS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "pixel_values", "image_grid_thw")
# What it takes instead: a dict of what `get_video_features` and `get_image_features` return, whose `pooler_output` lists
# features `[tokens, hidden]` of each video or picture.
ENCODED = "mm_encoder_outputs"
# Arguments with a value for each column, and what stands at padding; beside input_ids, attention_mask and position_ids.
PER_COLUMN = {"mm_token_type_ids": 0, "labels": -100}


def check_model(model) -> None:
    """Raises ModelError unless this is a model that can be pruned."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

    if not isinstance(model, Qwen2_5_VLForConditionalGeneration | Qwen2VLForConditionalGeneration):
        raise ModelError(f"a {type(model).__name__} cannot be pruned", SUPPORTED)
    tower_of(model)


def tower_of(model):
    """The vision tower of a Hugging Face model, or of a `qwen.QwenVL`.

    Raises:
        ModelError: it has none of Qwen2.5-VL's or Qwen2-VL's, or one that is built otherwise, or the weights are elsewhere.
    """
    from evoprune.model.weights import Tower

    visual = getattr(getattr(model, "model", None), "visual", None)
    if not isinstance(visual, Tower):
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

        if not isinstance(visual, Qwen2_5_VisionTransformerPretrainedModel | Qwen2VisionTransformerPretrainedModel):
            raise ModelError(f"a {type(model).__name__} has no vision tower of Qwen2.5-VL or Qwen2-VL", SUPPORTED)
    try:
        check_vision(vision_sizes(visual.config))
    except ValueError as problem:
        raise ModelError(f"the vision tower of this model cannot be run: {problem}", SUPPORTED) from problem
    if visual.patch_embed.proj.weight.is_meta:
        raise ModelError("the vision tower's weights are offloaded", "load the model with its tower on a device")
    return visual


def attention_layers(model) -> list[torch.nn.Module]:
    """The attention of each layer of the language model; called with `hidden_states`, `attention_mask` (`[B or 1, 1, L, keys]`,
    bool or numbers, or None where all before is seen) and `past_key_values`."""
    return [layer.self_attn for layer in model.model.language_model.layers]


def takes_numbers(model) -> bool:
    """Whether the language model's attention takes a mask of numbers, which are added to its logits."""
    return model.config.text_config._attn_implementation in ("eager", "sdpa")


def setting(model, call: dict, name: str):
    """A generation setting as `generate` will find it: among its arguments, in the config given, in the model's own."""
    for config in (call.get("generation_config"), model.generation_config):
        if call.get(name) is None and getattr(config, name, None) is not None:
            return getattr(config, name)
    return call.get(name)


def pad_id(model, call: dict) -> int:
    """The id that stands at padding."""
    pad, ends = setting(model, call, "pad_token_id"), setting(model, call, "eos_token_id")
    return int(torch.tensor(next(x for x in (pad, ends, 0) if x is not None)).flatten()[0])


def inferred_mask(model, call: dict) -> torch.Tensor:
    """The mask that `generate` makes where none is given, `[B, L]`: padding is what has the pad id, if that ends nothing."""
    ids, pad, ends = call["input_ids"], setting(model, call, "pad_token_id"), setting(model, call, "eos_token_id")
    is_end = ends is not None and pad in torch.tensor(ends).flatten().tolist()
    return torch.ones_like(ids) if pad is None or is_end else ids.ne(pad).long()


def text_positions(mask: torch.Tensor) -> torch.Tensor:
    """int64 `[B, L]`: tokens counted from 0 in each row, 0 at padding."""
    return (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 0)


def model_positions(model, call: dict, mask: torch.Tensor | None, generating: bool) -> torch.Tensor:
    """Where the model itself would have each column of a prompt, in `generate` (`[4, B, L]`) or in `forward` (`[3, B, L]`)."""
    known = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    given = {name: call.get(name) for name in known} | {"attention_mask": mask}
    if not has_clock(model):  # there is no such argument
        del given["second_per_grid_ts"]
    ids = call["input_ids"]
    if generating:
        return model._prepare_position_ids_for_generation(ids, given)
    positions = model.model.compute_3d_position_ids(input_ids=ids, inputs_embeds=None, past_key_values=None, **given)
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    return positions.expand(3, *ids.shape)


def qwen_positions(model, call: dict, mask: torch.Tensor | None) -> torch.Tensor:
    """Where Qwen's rule has each column of a prompt (`language.positions`), int64 `[3, B, L]`."""
    config, ids = model.config, call["input_ids"].cpu()
    per_second = vision_sizes(config.vision_config).tokens_per_second
    units = (call["video_grid_thw"], call.get("image_grid_thw"))
    videos, images = (iter([] if grids is None else grids.tolist()) for grids in units)
    seconds = iter(seconds_per_grid(call))
    positions = torch.zeros(3, *ids.shape, dtype=torch.int64)
    for row, used in enumerate(torch.ones_like(ids) if mask is None else mask.cpu()):
        used = used.bool()
        spans = list(_spans(config, ids[row, used], videos, images, seconds))
        positions[:, row, used] = prompt_positions(int(used.sum()), spans, per_second)
    return positions.to(call["input_ids"].device)


def has_clock(model) -> bool:
    """Whether positions follow a video's time; Qwen2-VL's count its grids."""
    return vision_sizes(model.config.vision_config).tokens_per_second is not None


def seconds_per_grid(call: dict) -> Sequence[float]:
    """Seconds from grid to grid of each video; where nothing is said it is taken for 1, as by Qwen2.5-VL."""
    seconds = call.get("second_per_grid_ts")
    return [1.0] * len(call["video_grid_thw"]) if seconds is None else [float(x) for x in seconds]


def _spans(
    config, ids: torch.Tensor, videos: Iterator, images: Iterator, seconds: Iterator[float]
) -> Iterator[VideoSpan]:
    """Videos and pictures of one row, in order; a picture is a video of one grid."""
    at, merge = 0, config.vision_config.spatial_merge_size
    while len(found := ((ids[at:] == config.video_token_id) | (ids[at:] == config.image_token_id)).nonzero()):
        at += int(found[0])
        is_video = int(ids[at]) == config.video_token_id
        t, h, w = next(videos if is_video else images)
        yield (span := VideoSpan(at, (t, h // merge, w // merge), next(seconds) if is_video else 1.0))
        at += span.tokens
