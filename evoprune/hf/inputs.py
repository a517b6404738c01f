"""Build the same model inputs as a Hugging Face processor, but without requiring torchvision.

Frames are read, sampled, and resized in the same way as in `VideoQA`, so `VideoQA` and the user's own model see the same pixels.
"""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Unpack

import torch
from transformers import BatchFeature

from evoprune.errors import EvopruneWarning
from evoprune.language import Prompt, Tokenizer
from evoprune.model import VisionConfig
from evoprune.report import VideoFacts, warning_text, warning_title
from evoprune.session import ModelOptions, describe, inputs_of, prompt_about, with_subtitles
from evoprune.signatures import takes
from evoprune.util import check_order, check_question, from_keywords
from evoprune.video import GivenInput, Input, InputLimits, Plan, SamplingOptions, probe, read_chunks
from evoprune.vision import normalised, patches_of

if TYPE_CHECKING:
    from evoprune.keywords import SamplingKeywords

ARGUMENT_NAMES = {"video": ("pixel_values_videos", "video_grid_thw"), "picture": ("pixel_values", "image_grid_thw")}
TOKEN_TYPES = {"picture": 1, "video": 2}  # `mm_token_type_ids` value for each input type


@takes(SamplingOptions, names=SamplingOptions.FILES, seek="exact")
def processor_inputs(
    model: str | PathLike[str],
    inputs: Input | Sequence[Input],
    question: str,
    *,
    times_s: Sequence[float] | None = None,
    system: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    **sampling: "Unpack[SamplingKeywords]",
) -> BatchFeature:
    """Prepare the arguments of `model.generate` for a question about videos and images, like the model's own processor.

    Args:
        model: "demo", "demo-scenes", a local folder, or a hub ID. Only the tokenizer and the input limits are read, not the
            weights.
        inputs: A video or an image, or a list of videos and images in the model's reading order; see `VideoQA.encode`.
        question: The question. Any special tokens in the question are treated as plain text.
        times_s: If the input is an array, the frame timestamps in seconds.
        system: The system prompt. None means the model's default.
        revision, offline: See `VideoQA.load`.
        sampling: Options of `VideoQA.encode`, with the same defaults, except that `max_visual_tokens` defaults to 24,576 and `seek`
            to "exact".

    Returns:
        The arguments for a single prompt, on the CPU; `.to(device)` moves them. They always include "input_ids", "attention_mask",
        and "mm_token_type_ids", int64 `[1, L]`. For videos, they include "pixel_values_videos", float32 `[patches, values]`,
        "video_grid_thw", int64 `[videos, 3]`, and with Qwen2.5-VL also "second_per_grid_ts", float32 `[videos]`. For images, they
        include "pixel_values" and "image_grid_thw" with analogous shapes.

    Raises:
        VideoError: If an input is missing, unreadable, or empty.
        ModelError: If the model is missing or unsupported, or its chat template cannot be used.
        UsageError: If an option has an invalid value.
        TypeError: If an option is unknown.
    """
    (options,) = from_keywords({"seek": "exact"} | sampling, SamplingOptions)
    if options.max_visual_tokens is None:  # the user's program runs the model, on an unknown device
        options = replace(options, max_visual_tokens=options.MAX_VISUAL_TOKENS)
    check_order(inputs, question, "evoprune.processor_inputs(model, inputs, question)")
    check_question(question)
    given = inputs_of(inputs, sampling.get("frame_rate"), times_s)
    options.check_one_file(len(given))
    checkpoint = describe(ModelOptions(model, revision, device="cpu", offline=offline))
    checkpoint.download_small_files()
    tokenizer = Tokenizer.load(checkpoint.folder)
    limits = checkpoint.limits
    vision = checkpoint.config.vision_config
    with ExitStack() as stack:
        files = [stack.enter_context(GivenInput(each).local(offline=offline)) for each in given]
        infos = [probe(file, folder_fps=options.frame_rate) for file in files]
        plans: list[Plan] = []
        for info, wanted in zip(infos, options.of_each(infos), strict=True):
            options.check_picture(info)
            plan = checkpoint.plan(info, wanted)
            plans.append(with_subtitles(tokenizer, plan, wanted, checkpoint.options))
        read = [read_patches(plan, limits[plan.kind]) for plan in plans]
    plans = [plan for plan, _ in read]
    prompt = prompt_about(tokenizer, vision, plans, question, system)
    return BatchFeature(arguments(prompt, read, limits, vision))


def read_patches(plan: Plan, limits: InputLimits, device: torch.device | str = "cpu") -> tuple[Plan, torch.Tensor]:
    """Read an input's sampled frames, resize them as planned, and convert them to patches.

    Args:
        device: The device used to resize the frames.

    Returns:
        A tuple of the plan, updated with the actual frame timestamps, and the patches, float32 `[patches, values]`.

    Raises:
        VideoError: If the input cannot be read.

    Warns:
        EvopruneWarning: If the input is damaged, or fewer frames were read than requested; see `report.WARNINGS`.
    """
    made: list[torch.Tensor] = []
    times_s: tuple[float, ...] = ()
    moved = other_size = False
    damaged = 0
    with closing(read_chunks(plan.source, plan.sampling.times_s, **plan.read_arguments)) as chunks:
        for chunk in chunks:
            made.append(normalised(patches_of(chunk.pixels, plan, limits, torch.device(device)), limits.normal))
            times_s += chunk.times_s
            moved = moved or chunk.moved
            other_size = other_size or chunk.other_size
            damaged += chunk.damaged
    _warn(plan, damaged, other_size)
    return replace(plan, read_s=times_s, moved=moved), torch.cat(made)


def _warn(plan: Plan, damaged: int, other_size: bool) -> None:
    """Emit the warnings that a report about this input would contain."""
    found = {
        "cut_short": plan.cut_short,
        "limited": plan.limited,
        "damaged_video": damaged > 0,
        "changing_size": other_size,
    }
    names = [*(name for name, true in found.items() if true), *plan.info.warnings, *plan.subtitles.warnings]
    known = {field.name: getattr(plan.info, field.name, None) for field in fields(VideoFacts)}
    video = VideoFacts(**known | {"path": plan.name, "damaged": damaged})
    for name in names:
        if warning_title(name) == "warning":
            warnings.warn(warning_text(name, video), EvopruneWarning, stacklevel=5)


def arguments(
    prompt: Prompt,
    read: Sequence[tuple[Plan, torch.Tensor]],
    limits: dict[str, InputLimits],
    vision: VisionConfig,
) -> dict[str, torch.Tensor]:
    """Return the arguments of `model.generate` (see `processor_inputs`) for a prompt with inputs that have already been read.

    Args:
        prompt: The prompt, with placeholders for all inputs.
        read: The results of `read_patches`, one per input.
        limits: The model's input limits, by input type.
        vision: The config of the model's vision tower.
    """
    ids = prompt.input_ids
    plans = [plan for plan, _ in read]
    types = torch.zeros_like(ids)
    for place, plan in zip(prompt.places, plans, strict=True):
        types[place.columns] = TOKEN_TYPES[plan.kind]
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "mm_token_type_ids": types[None]}
    for kind, (pixels, grids) in ARGUMENT_NAMES.items():
        patches = [patches for plan, patches in read if plan.kind == kind]
        if not patches:
            continue
        merge = limits[kind].merge_size
        shapes = [(plan.grid[0], plan.grid[1] * merge, plan.grid[2] * merge) for plan in plans if plan.kind == kind]
        inputs |= {pixels: torch.cat(patches), grids: torch.tensor(shapes, dtype=torch.int64, device="cpu")}
    videos = [plan for plan in plans if not plan.is_picture]
    if videos and vision.tokens_per_second is not None:  # other models' processors don't return this
        pair = limits["video"].temporal_patch_size
        seconds = [plan.sampling.seconds_per_pair(pair) for plan in videos]
        inputs["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float32, device="cpu")
    return inputs
