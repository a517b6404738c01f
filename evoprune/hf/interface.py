"""The interface to Hugging Face models (Qwen2-VL to Qwen4-Exp): everything that `evoprune.hf` relies on, except their weights.

tests/hf/test_interface.py checks these assumptions, so it fails if a new release of transformers breaks one of them.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version
from inspect import signature
from math import prod
from typing import Any

import torch

from evoprune.backend import Device, cache_name
from evoprune.errors import ModelError, UsageError
from evoprune.language import Place, prompt_positions
from evoprune.methods import arange_on
from evoprune.model import FAMILIES, VisionConfig

MODELS = [f"{family.model}ForConditionalGeneration" for family in FAMILIES.values()]
SUPPORTED = (
    f"supported: {', '.join(MODELS[:-1])} and {MODELS[-1]} of transformers; unwrap the model "
    "(PEFT: get_base_model(), torch.compile: _orig_mod)"
)
# Arguments of `forward` for videos and images. They must be left out once the videos and images have been encoded.
VISION_INPUTS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "pixel_values", "image_grid_thw")
# The argument that replaces `VISION_INPUTS`: a dict that contains the results of `get_video_features` and `get_image_features`. The
# `pooler_output` of each result is a list with one tensor of features `[tokens, hidden]` per video or image. transformers before
# 5.18 has no such argument; see `encoded_inputs` for the workaround.
ENCODED = "mm_encoder_outputs"
# Hint for error messages. It asks about placeholders, because processors mistake a placeholder in a question for an input.
ONE_CALL = (
    "pass everything that one processor call returned, in order; is <|video_pad|> or <|image_pad|> in a question?"
)
# Prefix of the names of arguments and settings for videos (True) and images (False).
PREFIXES = {True: "video", False: "image"}
NEEDED = "transformers 5.20 or later"  # for messages about features that require it
# The kind of all layers if the config does not specify kinds. The model then accepts a single mask instead of a dict of masks.
ONLY_KIND = "full_attention"
LINEAR = "linear_attention"  # layers of Qwen3.5 that have a recurrent state
OLD_CACHE_NAME = "past_key_values"  # name of the KV cache argument before transformers 5.24
# Arguments with one entry per column, other than input_ids, attention_mask and position_ids, and their values at padding.
PER_COLUMN = {"mm_token_type_ids": 0, "labels": -100, "shift_labels": -100}


def check_class(model) -> None:
    """Check that evoprune can prune inside models of this class.

    Raises:
        ModelError: If the model's class is not in `MODELS`.
    """
    if not _is_one_of(model, MODELS):
        raise ModelError(f"an object of class {type(model).__name__} cannot be pruned", SUPPORTED)


def tower_of(model):
    """Return the vision tower of a Hugging Face model, or of a `model.weights.QwenVL`.

    Raises:
        ModelError: If the model has no tower of a supported family, the structure or the device of the tower is not supported, or
            an adapter changes a module that evoprune does not call.
    """
    from evoprune.model import Tower

    visual = getattr(getattr(model, "model", None), "visual", None)
    if not (isinstance(visual, Tower) or _is_one_of(visual, [family.tower for family in FAMILIES.values()])):
        what = f"an object of class {type(model).__name__}"
        raise ModelError(
            f"{what} has no vision tower of Qwen4-Exp, Qwen3.5, Qwen3-VL, Qwen2.5-VL or Qwen2-VL", SUPPORTED
        )
    try:
        VisionConfig.of(visual.config).check()
    except ValueError as problem:
        raise ModelError(f"the vision tower of this model cannot be run: {problem}", SUPPORTED) from problem
    if not Device(visual.patch_embed.proj.weight.device).holds_values:
        raise ModelError("the vision tower's weights are offloaded", "load the model with its tower on a device")
    for name, module in visual.named_modules():
        # evoprune calls only linear layers. It reads other modules' weights directly, which bypasses any wrapper around them.
        if not isinstance(getattr(module, "base_layer", None), torch.nn.Linear | None):
            hint = "merge it (PEFT: merge_and_unload), or leave this module out of target_modules; adapters on linear layers work"
            raise ModelError(f"an adapter on {name} of the vision tower would not run", hint)
    return visual


def _is_one_of(x, names: Sequence[str]) -> bool:
    """Return True if an object is an instance of a transformers class with one of these names, or of a subclass."""
    return any(kind.__name__ in names and kind.__module__.startswith("transformers.") for kind in type(x).__mro__)


# The features of a video or an image, `[tokens, hidden]`, and its DeepStack features, `[n, tokens, hidden]`, or None if the model
# has no DeepStack.
Features = tuple[torch.Tensor, torch.Tensor | None]


class _Features(torch.Tensor):
    """Encoded features of videos, which are passed to the model in place of the videos' pixels."""


def encoded_inputs(model, call: dict, videos: Sequence[Features], pictures: Sequence[Features] | None = None) -> dict:
    """Return the arguments that pass encoded videos and the call's images to `forward` or `generate`.

    Before transformers 5.18, the features take the place of the pixels, and each video's grid has a single row. `generate` repeats
    the features for beam search, and passes them only to the first step.

    Args:
        model: A model that was prepared by `accept_features`.
        images: The features of the images, or None if the model encodes the images itself.

    Raises:
        UsageError: If transformers is older than 5.18, and images are encoded or the call uses chunked prefill, which would ignore
            the videos.
    """
    if not takes_encoded(model):
        if pictures is not None:
            raise _too_old("encoded images")
        videos = [features for features, _ in videos]
        if setting(model, call, "prefill_chunk_size") is not None:
            hint = f"unset it, or use {NEEDED}"
            raise UsageError("prefill_chunk_size leaves out videos in this version of transformers", hint)
        pictures = {name: call[name] for name in ("pixel_values", "image_grid_thw") if call.get(name) is not None}
        grids = torch.tensor([[1, 1, len(features)] for features in videos], dtype=torch.int64, device=videos[0].device)
        return pictures | {"pixel_values_videos": torch.cat(videos).as_subclass(_Features), "video_grid_thw": grids}
    encoded = dict(call.get(ENCODED) or {})
    if videos:
        encoded["video"] = _output(videos)
    if pictures is not None:
        encoded["image"] = _output(pictures)
    elif call.get("pixel_values") is not None:
        encoded["image"] = model.get_image_features(call["pixel_values"], call["image_grid_thw"], return_dict=True)
    return {ENCODED: encoded}


def _output(visuals: Sequence[Features]):
    """Return features in the format of `get_video_features`: one list of features, and one more list per DeepStack layer."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    features, inner = zip(*visuals, strict=True)
    if inner[0] is None:
        return BaseModelOutputWithPooling(pooler_output=list(features))
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    of_layers = [list(layer) for layer in zip(*inner, strict=True)]
    return BaseModelOutputWithDeepstackFeatures(pooler_output=list(features), deepstack_features=of_layers)


def accept_features(model) -> None:
    """Patch the class of `model.model` to accept features from `encoded_inputs`, if transformers is older than 5.18.

    The patch is permanent.

    Raises:
        UsageError: If transformers is older than 5.18 and the model has DeepStack (Qwen3-VL), whose features it cannot pass.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    kind = type(model.model)
    stock = kind.get_video_features
    if takes_encoded(model) or hasattr(stock, "returns_features"):
        return
    if getattr(model.config.vision_config, "deepstack_visual_indexes", None):
        raise _too_old("encoded videos of Qwen3-VL")

    @wraps(stock)
    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs):
        if not isinstance(pixel_values_videos, _Features):
            return stock(self, pixel_values_videos, video_grid_thw, **kwargs)
        features = pixel_values_videos.as_subclass(torch.Tensor)
        return BaseModelOutputWithPooling(pooler_output=features.split(video_grid_thw.prod(-1).tolist()))

    get_video_features.returns_features = True
    kind.get_video_features = get_video_features


def takes_encoded(model) -> bool:
    """Return True if the model accepts encoded videos. This requires transformers 5.18 or later.

    Only the signature of the inner model is checked, because that is where the encoded videos are read. An outer `forward` from
    other code, such as Liger or a subclass, may pass them on without a named argument.
    """
    return ENCODED in signature(type(model.model).forward).parameters


def _too_old(what: str) -> UsageError:
    return UsageError(f"transformers {version('transformers')} does not accept {what}", f"use {NEEDED}")


def accepts_float_mask(model) -> bool:
    """Return True if the language model's attention accepts a float mask, which is added to the attention logits."""
    return model.config.text_config._attn_implementation in ("eager", "sdpa")


def attention_masks(model, call: dict) -> tuple[dict[str, torch.Tensor], torch.Size, torch.dtype]:
    """Expand the `attention_mask` of a call to the masks that the layers use, for eager or sdpa attention.

    The `attention_mask` may be `[B, columns]`, None, an expanded mask `[B, 1, L, keys]`, or a dict of expanded masks.

    Returns:
        A tuple of the masks, the shape (B, L) of the columns, and the dtype of their embeddings. The masks, `[B, 1, L, keys]` each,
        are in a dict by kind of layer (`ONLY_KIND` if the config does not specify kinds). For sdpa, they are bool and True at
        visible keys. For eager attention, they are float and contain the dtype's lowest number at hidden keys. The mask of linear
        attention is `[B, L]` and 0 at padding, or None.
    """
    from transformers import masking_utils

    config = model.config.text_config
    ids = call.get("input_ids")
    embeds = call.get("inputs_embeds")
    if embeds is None:  # a stand-in; only its shape, dtype and device are used
        embeds = torch.empty(*ids.shape, 0, dtype=model.get_input_embeddings().weight.dtype, device=ids.device)
    given = call.get("attention_mask")
    masks = {}
    for kind in dict.fromkeys(getattr(config, "layer_types", None) or [ONLY_KIND]):
        ready = given.get(kind) if isinstance(given, dict) else given
        if ready is None or ready.ndim == 2:
            make = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
            ready = make(config, embeds, ready, cache_of(call), allow_is_causal_skip=False)
        masks[kind] = ready
    return masks, embeds.shape[:2], embeds.dtype


def cache_of(values: Mapping) -> Any:
    """Return the KV cache from the arguments or outputs of a transformers model, or None if there is no cache.

    This also looks for the old name of the argument, because transformers 5.24 and later still accept it.
    """
    return next((values[name] for name in (cache_name(), OLD_CACHE_NAME) if values.get(name) is not None), None)


def with_cluster_bias(model, call: dict, sizes: torch.Tensor) -> dict:
    """Weight every column of a `forward` call by its cluster size, by adding log(size) to the attention mask.

    In evoprune's own decoder, `language.decoder.forward` adds this bias to the attention logits. Here the model's own layers run,
    so the bias has to be part of the call's attention mask. In this way, layers that are recomputed for gradient checkpointing see
    the bias too, and calls in other threads are not affected.

    Args:
        model: A model for which `accepts_float_mask` returns True.
        sizes: The cluster sizes of the prompt's columns, float32 `[B, C]`. Later columns have size 1. If the call has n * B rows
            because of beam search, each row of `sizes` applies to n consecutive rows of the call.
    """
    masks, shape, dtype = attention_masks(model, call)
    kinds = getattr(model.config.text_config, "layer_types", None)
    cache = cache_of(call)
    bias = sizes.log().repeat_interleave(shape[0] // len(sizes), 0)
    weighted = {}
    for kind, mask in masks.items():
        if kind == LINEAR:  # linear attention has no logits, so there is nothing to bias
            weighted[kind] = mask
            continue
        # If a cache with a sliding window has dropped keys, the first key is not key 0.
        first = 0
        if cache is not None:
            _, first = cache.get_mask_sizes(shape[1], (kinds or [ONLY_KIND]).index(kind))
        end = first + mask.shape[-1]
        of_keys = torch.nn.functional.pad(bias, (0, max(0, end - bias.shape[1])))[:, None, None, first:end]
        if mask.dtype == torch.bool:
            # Use minus infinity, as sdpa does for a bool mask, so that a row that sees no keys gets an output of zero. With the
            # lowest finite number, its output would be the mean over all keys' values, including later columns.
            weighted[kind] = torch.where(mask, of_keys.to(mask.device, dtype), -torch.inf)
        else:
            # Leave masked entries alone, because adding to them could overflow to minus infinity. Eager attention turns a row of
            # infinities into NaN.
            seen = mask > torch.finfo(mask.dtype).min / 2
            weighted[kind] = torch.where(seen, mask + of_keys.to(mask.device, mask.dtype), mask)
    if list(weighted) == [ONLY_KIND] and not hasattr(model.config.text_config, "layer_types"):
        weighted = weighted[ONLY_KIND]
    return call | {"attention_mask": weighted}


def warn_of_hooks(visual) -> None:
    """Warn about forward hooks on the tower's modules, except for the hooks that transformers uses to enable input gradients."""
    hooks = [
        name or "visual"
        for name, module in visual.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not (getattr(hook, "__module__", None) or "").startswith("transformers.")
    ]
    if hooks:
        named = ", ".join(hooks[:4])
        if len(hooks) > 4:
            named += f" and {len(hooks) - 4} others"
        what = f"hooks on the vision tower are skipped, or see evoprune's rows, while the model prunes: {named}"
        warnings.warn(f"{what}; use the result of evoprune.encode, or remove the pruning first", stacklevel=3)


def has_video(call: dict) -> bool:
    """Return True if a call includes a video, either as patches from the processor or already encoded."""
    return call.get("pixel_values_videos") is not None or (call.get(ENCODED) or {}).get("video") is not None


def has_picture(call: dict) -> bool:
    """Return True if a call includes an image, either as patches from the processor or already encoded."""
    return call.get("pixel_values") is not None or (call.get(ENCODED) or {}).get("image") is not None


def is_assistant(call: dict) -> bool:
    """Return True if a `generate` call belongs to an assistant model, which drafts tokens for another model.

    Such a call receives the prompt and the encoded videos of the other model.
    """
    return bool(getattr(call.get("generation_config"), "is_assistant", False))


def setting(model, call: dict, name: str):
    """Return the value of a generation setting, with the same precedence as in `generate`.

    The arguments of the call come first, then the generation config that was passed to the call, and then the model's generation
    config.
    """
    for config in (call.get("generation_config"), model.generation_config):
        if call.get(name) is None and getattr(config, name, None) is not None:
            return getattr(config, name)
    return call.get(name)


def pad_id(model, call: dict) -> int:
    pad = setting(model, call, "pad_token_id")
    ends = setting(model, call, "eos_token_id")
    return next(_ids(x)[0] for x in (pad, ends, 0) if x is not None)


def _ids(setting: int | Sequence[int] | torch.Tensor) -> list[int]:
    """Convert a setting that contains token ids, as a number, a list or a tensor, to a list."""
    return torch.as_tensor(setting, dtype=torch.int64, device="cpu").flatten().tolist()


def inferred_mask(model, call: dict) -> torch.Tensor:
    """Return the attention mask that `generate` infers if it is called without one, int64 `[B, L]`.

    The mask is 0 at pad tokens. If the pad token is also an end-of-text token, the mask is 1 everywhere.
    """
    ids = call["input_ids"]
    pad = setting(model, call, "pad_token_id")
    ends = setting(model, call, "eos_token_id")
    if pad is None or (ends is not None and pad in _ids(ends)):
        return torch.ones_like(ids)
    return ids.ne(pad).long()


def mask_or_ones(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the attention mask of a prompt, `[B, L]`, or a mask of ones if the prompt has none."""
    return torch.ones_like(ids) if mask is None else mask


def text_positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the tokens' zero-based indices in their rows, not counting padding, int64 `[B, L]`. Padding gets index 0."""
    return (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 0)


def model_positions(model, call: dict, mask: torch.Tensor | None, generating: bool) -> torch.Tensor:
    """Return the positions that the Hugging Face model itself computes for the columns of a prompt.

    The result is int64 `[4, B, L]` if `generating` is True, and `[3, B, L]` otherwise.
    """
    known = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    given = {name: call.get(name) for name in known} | {"attention_mask": mask}
    if not has_clock(model):  # the model does not accept this argument
        del given["second_per_grid_ts"]
    ids = call["input_ids"]
    if generating:
        return model._prepare_position_ids_for_generation(ids, given)
    positions = model.model.compute_3d_position_ids(input_ids=ids, inputs_embeds=None, **given | {cache_name(): None})
    if positions is None:
        positions = arange_on(ids.shape[1], ids.device)
    return positions.expand(3, *ids.shape)


def qwen_positions(model, call: dict, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the M-RoPE positions of a prompt's columns according to Qwen's rule (`language.prompt`), int64 `[3, B, L]`."""
    ids = call["input_ids"]
    per_second = VisionConfig.of(model.config.vision_config).tokens_per_second
    positions = torch.zeros(3, *ids.shape, dtype=torch.int64, device="cpu")
    rows = mask_or_ones(ids, mask).cpu().bool()
    for row, (used, inputs) in enumerate(zip(rows, placed_inputs(model, call, mask), strict=True)):
        videos = [run for each in inputs for run in each.place.positions(each.grid, each.seconds_per_pair, per_second)]
        positions[:, row, used] = prompt_positions(int(used.sum()), videos)
    return positions.to(ids.device)


@dataclass(frozen=True)
class PlacedInput:
    """A video or an image in one row of a batch. Its columns do not count padding, and an image is a single frame pair."""

    place: Place  # only the placeholders, without the timestamps and markers around them
    grid: tuple[int, int, int]  # number of frame pairs, rows of units and columns of units
    seconds_per_pair: float
    is_video: bool


def placed_inputs(model, call: dict, mask: torch.Tensor | None) -> list[list[PlacedInput]]:
    """Find the videos and images in every row of a batch of prompts, in order of occurrence.

    Raises:
        UsageError: If the grid of a video or an image is missing, or does not match its placeholders.
    """
    ids = call["input_ids"].cpu()
    grids = {video: _rows(call.get(f"{word}_grid_thw")) for video, word in PREFIXES.items()}
    seconds = iter(seconds_per_pair(call))
    rows = mask_or_ones(ids, mask).cpu().bool()
    return [list(_placed(model.config, ids[row, used], grids, seconds)) for row, used in enumerate(rows)]


def _rows(grids: torch.Tensor | None) -> Iterator[list[int]]:
    if grids is not None:
        yield from grids.tolist()


def has_clock(model) -> bool:
    """Return True if the model's temporal positions depend on the time in seconds, as in Qwen2.5-VL.

    In Qwen2-VL, temporal positions count frame pairs instead, and Qwen3-VL learns the time from timestamps in the text.
    """
    return VisionConfig.of(model.config.vision_config).tokens_per_second is not None


def seconds_per_pair(call: dict) -> Sequence[float]:
    """Return the time between consecutive frame pairs, in seconds, for each video in a call.

    If the call does not specify this time, the default is 1 second, as in Qwen2.5-VL.
    """
    seconds = call.get("second_per_grid_ts")
    grids = call.get("video_grid_thw")
    if grids is None:
        return []
    if seconds is None:
        return [1.0] * len(grids)
    return [float(x) for x in seconds]


def _placed(
    config, ids: torch.Tensor, grids: dict[bool, Iterator[list[int]]], seconds: Iterator[float]
) -> Iterator[PlacedInput]:
    """Find the videos and images in one row of a batch, in order of occurrence."""
    at = 0
    merge = config.vision_config.spatial_merge_size
    has_timestamps = VisionConfig.of(config.vision_config).traits.timestamps
    tokens = (ids == config.video_token_id) | (ids == config.image_token_id)
    while len(offsets := tokens[at:].nonzero()):
        token = ids[at + int(offsets[0])]
        is_video = int(token) == config.video_token_id
        grid = next(grids[is_video], None)
        if grid is None:
            raise _mismatch(is_video, "there is no row for it")
        t, h, w = grid
        second = 1.0
        count = 1
        if is_video:
            second = next(seconds)
            if has_timestamps:
                count = t
        in_units = (t, h // merge, w // merge)
        runs = []
        for _ in range(count):
            at += int((tokens[at:].cumsum(0) == 0).sum())  # skip to the next placeholder, if there is one
            run = range(at, at + prod(in_units) // count)
            if run.stop > len(ids) or bool((ids[run.start : run.stop] != token).any()):
                raise _mismatch(is_video, f"its row is {grid}")
            runs.append(run)
            at = run.stop
        yield PlacedInput(Place(tuple(runs)), in_units, second, is_video)


def _mismatch(video: bool, why: str) -> UsageError:
    name = PREFIXES[video]
    problem = f"a run of {name} tokens in input_ids does not fit {name}_grid_thw: {why}"
    return UsageError(problem, ONE_CALL)
