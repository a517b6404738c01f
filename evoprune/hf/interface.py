"""The interface to Hugging Face models (Qwen2-VL to Qwen4-Exp): everything `evoprune.hf` relies on except the weights.

tests/hf/test_interface.py checks these assumptions, so it fails if a new transformers release breaks one of them.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version
from inspect import signature
from math import prod
from os import PathLike
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
# Arguments of `forward` for videos and images. They must be omitted once the videos and images have been encoded.
VISION_INPUTS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "pixel_values", "image_grid_thw")
# The argument that replaces `VISION_INPUTS`: a dict with the results of `get_video_features` and `get_image_features`. Each
# result's `pooler_output` is a list with one feature tensor `[tokens, hidden]` per video or image. transformers versions before
# 5.18 lack this argument; see `encoded_inputs` for the workaround.
ENCODED = "mm_encoder_outputs"
# Error message hint. It mentions placeholders, because processors mistake a placeholder in the question for an input.
ONE_CALL = (
    "pass everything that one processor call returned, in order; is <|video_pad|> or <|image_pad|> in a question?"
)
# Prefixes of argument and setting names for videos (True) and images (False).
PREFIXES = {True: "video", False: "image"}
NEEDED = "transformers 5.20 or later"  # for error messages about features that require it
# The layer type if the config doesn't specify layer types. The model then accepts a single mask instead of a dict of masks.
ONLY_KIND = "full_attention"
LINEAR = "linear_attention"  # Qwen3.5 layers with a recurrent state
OLD_CACHE_NAME = "past_key_values"  # name of the KV cache argument before transformers 5.24
# Arguments with one entry per column, except input_ids, attention_mask, and position_ids, mapped to their padding values.
PER_COLUMN = {"mm_token_type_ids": 0, "labels": -100, "shift_labels": -100}


def check_class(model) -> None:
    """Check that evoprune supports pruning inside models of this class.

    Raises:
        ModelError: If the model's class is not in `MODELS`.
    """
    if not _is_one_of(model, MODELS):
        raise ModelError(f"an object of class {type(model).__name__} cannot be pruned", _instead_of(model))


def _instead_of(given: Any) -> str:
    """Return a hint for a caller who passes this instead of a Hugging Face model."""
    kind = type(given)
    if isinstance(given, str | PathLike):
        return f"to load a model that prunes: evoprune.VideoQA.load({str(given)!r}, budget=0.1)"
    if kind.__module__.partition(".")[0] != "evoprune" or isinstance(given, torch.nn.Module):
        return SUPPORTED
    if kind.__name__ == "PrunedModel":
        return "pass the model itself"
    return "a VideoQA prunes already; set its budget: evoprune.VideoQA.load(model, budget=0.1)"


def tower_of(model):
    """Return the vision tower of a Hugging Face model, or of a `model.weights.QwenVL`.

    Raises:
        ModelError: If the model has no tower from a supported family, the tower's structure or device isn't supported, or an
            adapter modifies a module that evoprune doesn't call.
    """
    from evoprune.model import Tower

    visual = getattr(getattr(model, "model", None), "visual", None)
    if not (isinstance(visual, Tower) or _is_one_of(visual, [family.tower for family in FAMILIES.values()])):
        what = f"an object of class {type(model).__name__}"
        raise ModelError(f"{what} has no vision tower of a supported model", SUPPORTED)
    try:
        VisionConfig.of(visual.config).check()
    except ValueError as problem:
        raise ModelError(f"the vision tower of this model cannot be run: {problem}", SUPPORTED) from problem
    if not all(Device(weight.device).holds_values for weight in visual.parameters()):
        raise ModelError("the vision tower's weights are offloaded", "load the model with its tower on a device")
    for name, module in visual.named_modules():
        # evoprune calls only linear layers. It reads the weights of other modules directly, bypassing any wrappers.
        if not isinstance(getattr(module, "base_layer", None), torch.nn.Linear | None):
            hint = "merge it (PEFT: merge_and_unload), or leave this module out of target_modules; adapters on linear layers work"
            raise ModelError(f"an adapter on {name} of the vision tower would not run", hint)
    return visual


def _is_one_of(x, names: Sequence[str]) -> bool:
    """Return True if an object is an instance of a transformers class with one of the given names, or of a subclass."""
    return any(kind.__name__ in names and kind.__module__.startswith("transformers.") for kind in type(x).__mro__)


# The features of a video or an image, `[tokens, hidden]`, and its DeepStack features, `[n, tokens, hidden]`, or None for a model
# without DeepStack.
Features = tuple[torch.Tensor, torch.Tensor | None]


class _Features(torch.Tensor):
    """Encoded video features, which are passed to the model in place of pixels."""


def encoded_inputs(model, call: dict, videos: Sequence[Features], pictures: Sequence[Features] | None = None) -> dict:
    """Return the arguments for passing encoded videos, and a call's images, to `forward` or `generate`.

    With transformers versions before 5.18, features are passed in place of pixels, and each video's grid has a single row.
    `generate` repeats the features for beam search, and passes them only to the first step.

    Args:
        model: A model prepared by `accept_features`.
        pictures: The image features, or None if the model encodes the images itself.

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
    """Return features in the format of `get_video_features`: a list of features, plus a list for each DeepStack layer."""
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
        UsageError: If the model has DeepStack (Qwen3-VL), and transformers is older than 5.18 and cannot pass DeepStack features.
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

    Only the inner model's signature is checked, because the inner model reads the encoded videos. An outer `forward` method from
    other code, such as Liger or a subclass, may pass them on without a named argument.
    """
    return ENCODED in signature(type(model.model).forward).parameters


def _too_old(what: str) -> UsageError:
    return UsageError(f"transformers {version('transformers')} does not accept {what}", f"use {NEEDED}")


def accepts_float_mask(model) -> bool:
    """Return True if the language model's attention supports a float mask, which is added to the attention logits."""
    return model.config.text_config._attn_implementation in ("eager", "sdpa")


def attention_masks(model, call: dict) -> tuple[dict[str, torch.Tensor], torch.Size, torch.dtype]:
    """Expand a call's `attention_mask` to the masks used by the layers, for eager or sdpa attention.

    The `attention_mask` may be `[B, columns]`, None, an expanded mask `[B, 1, L, keys]`, or a dict of expanded masks.

    Returns:
        A tuple of a dict of masks, the shape (B, L) of the columns, and the dtype of their embeddings. The dict maps each layer
        type (`ONLY_KIND` if the config doesn't specify layer types) to a mask `[B, 1, L, keys]`. For sdpa, masks are bool and True
        at visible keys. For eager attention, they are float, with the dtype's lowest number at hidden keys. The mask for linear
        attention is `[B, L]` and 0 at padding, or None.
    """
    from transformers import masking_utils

    config = model.config.text_config
    ids = call.get("input_ids")
    embeds = call.get("inputs_embeds")
    if embeds is None:  # a stand-in, of which only the shape, dtype, and device are used
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
    """Return the KV cache from a transformers model's arguments or outputs, or None if there is no cache.

    The old argument name is also supported, because transformers 5.24 and later still accept it.
    """
    return next((values[name] for name in (cache_name(), OLD_CACHE_NAME) if values.get(name) is not None), None)


def with_cluster_bias(model, call: dict, sizes: torch.Tensor) -> dict:
    """Weight each column in a `forward` call by its cluster size, by adding log(size) to the attention mask.

    In evoprune's own decoder, `language.decoder.forward` adds this bias to the attention logits. When the model's own layers run,
    the bias has to be part of the call's attention mask. That way, it also applies to layers recomputed for gradient checkpointing,
    and doesn't affect calls in other threads.

    Args:
        model: A model for which `accepts_float_mask` returns True.
        sizes: The cluster sizes of the prompt columns, float32 `[B, C]`. Later columns have size 1. If the call has n * B rows
            because of beam search, each row of `sizes` applies to n consecutive rows in the call.
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
        # If a sliding-window cache has dropped keys, the first key isn't key 0.
        first = 0
        if cache is not None:
            _, first = cache.get_mask_sizes(shape[1], (kinds or [ONLY_KIND]).index(kind))
        end = first + mask.shape[-1]
        of_keys = torch.nn.functional.pad(bias, (0, max(0, end - bias.shape[1])))[:, None, None, first:end]
        if mask.dtype == torch.bool:
            # Use minus infinity, as sdpa does for a bool mask, so that the output of a row with no visible keys is zero. With the
            # lowest finite number, the output would be the mean of all values, including those of later columns.
            weighted[kind] = torch.where(mask, of_keys.to(mask.device, dtype), -torch.inf)
        else:
            # Don't modify masked entries, because adding to them could overflow to minus infinity. Eager attention would turn a
            # row of infinities into NaN.
            seen = mask > torch.finfo(mask.dtype).min / 2
            weighted[kind] = torch.where(seen, mask + of_keys.to(mask.device, mask.dtype), mask)
    if list(weighted) == [ONLY_KIND] and not hasattr(model.config.text_config, "layer_types"):
        weighted = weighted[ONLY_KIND]
    return call | {"attention_mask": weighted}


def warn_of_hooks(visual) -> None:
    """Warn about forward hooks on the tower's modules, except for hooks used by transformers to enable input gradients."""
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
    """Return True if a call includes a video, either encoded or as patches from the processor."""
    return call.get("pixel_values_videos") is not None or (call.get(ENCODED) or {}).get("video") is not None


def has_picture(call: dict) -> bool:
    """Return True if a call includes an image, either encoded or as patches from the processor."""
    return call.get("pixel_values") is not None or (call.get(ENCODED) or {}).get("image") is not None


def is_assistant(call: dict) -> bool:
    """Return True if a `generate` call is for an assistant model, which drafts tokens for another model.

    An assistant's call receives the other model's prompt and encoded videos.
    """
    return bool(getattr(call.get("generation_config"), "is_assistant", False))


def setting(model, call: dict, name: str):
    """Return the value of a generation setting, with the same precedence as in `generate`.

    The call's arguments take precedence over the generation config passed to the call, which takes precedence over the model's own
    generation config.
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
    """Convert a setting containing token IDs, as a number, a list, or a tensor, to a list."""
    return torch.as_tensor(setting, dtype=torch.int64, device="cpu").flatten().tolist()


def inferred_mask(model, call: dict) -> torch.Tensor:
    """Return the attention mask that `generate` infers when called without a mask, int64 `[B, L]`.

    The mask is 0 at pad tokens. If the pad token is also an end-of-text token, the mask is 1 everywhere.
    """
    ids = call["input_ids"]
    pad = setting(model, call, "pad_token_id")
    ends = setting(model, call, "eos_token_id")
    if pad is None or (ends is not None and pad in _ids(ends)):
        return torch.ones_like(ids)
    return ids.ne(pad).long()


def mask_or_ones(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the given attention mask, `[B, L]`, or a mask of ones if it is None."""
    return torch.ones_like(ids) if mask is None else mask


def text_positions(mask: torch.Tensor) -> torch.Tensor:
    """Return each token's zero-based index in its row, excluding padding, int64 `[B, L]`. The index of padding is 0."""
    return (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 0)


def model_positions(model, call: dict, mask: torch.Tensor | None, generating: bool) -> torch.Tensor:
    """Return the prompt column positions computed by the Hugging Face model itself.

    The result is int64 `[4, B, L]` if `generating` is True, and `[3, B, L]` otherwise.
    """
    known = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    given = {name: call.get(name) for name in known} | {"attention_mask": mask}
    if not has_clock(model):  # the model doesn't accept this argument
        del given["second_per_grid_ts"]
    ids = call["input_ids"]
    if generating:
        return model._prepare_position_ids_for_generation(ids, given)
    positions = model.model.compute_3d_position_ids(input_ids=ids, inputs_embeds=None, **given | {cache_name(): None})
    if positions is None:
        positions = arange_on(ids.shape[1], ids.device)
    return positions.expand(3, *ids.shape)


def qwen_positions(model, call: dict, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the M-RoPE positions of the prompt columns according to Qwen's rule (`language.prompt`), int64 `[3, B, L]`."""
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
    """A video or an image in a batch row. Column indices exclude padding, and an image counts as a single frame pair."""

    place: Place  # location of the placeholders, without the surrounding timestamps and markers
    grid: tuple[int, int, int]  # number of frame pairs, unit rows, and unit columns
    seconds_per_pair: float
    is_video: bool


def placed_inputs(model, call: dict, mask: torch.Tensor | None) -> list[list[PlacedInput]]:
    """Find the videos and images in each row of a batch of prompts, in order of occurrence.

    Raises:
        UsageError: If the grid of a video or an image is missing, or doesn't match the number of placeholders.
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

    In Qwen2-VL, temporal positions count frame pairs instead, and Qwen3-VL reads timestamps in the text.
    """
    return VisionConfig.of(model.config.vision_config).tokens_per_second is not None


def seconds_per_pair(call: dict) -> Sequence[float]:
    """Return the time between consecutive frame pairs, in seconds, for each video in a call.

    If not specified in the call, it defaults to 1 second, as in Qwen2.5-VL.
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
    """Find the videos and images in a single batch row, in order of occurrence."""
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
            at += int((tokens[at:].cumsum(0) == 0).sum())  # skip to the next placeholder, if any
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
