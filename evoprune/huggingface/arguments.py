"""Checks what a caller gives to the encoder of a Hugging Face model: its processor's output, seconds and a question."""

from collections.abc import Callable, Sequence
from functools import wraps
from math import isfinite
from numbers import Real

import torch

from evoprune.errors import UsageError
from evoprune.model.config import vision_sizes
from evoprune.model.numerics import all_numbers

PROCESSOR = (
    "pass pixel_values_videos and video_grid_thw of one call of the processor (return_tensors='pt'), in this order"
)


def settings_alone(init: Callable) -> Callable:
    """Decorates `PruningContext.__init__`: a model among the settings is an error that says where it belongs."""

    @wraps(init)
    def checked(self, *args, **given) -> None:
        for model in (*args, *given.values()):
            if isinstance(model, torch.nn.Module):
                hint = "first the settings, then the model: EvoPrune(budget=0.1)(model)"
                raise UsageError(f"an object of class {type(model).__name__} is no setting", hint)
        init(self, *args, **given)

    return checked


def check_videos(visual, pixels: torch.Tensor, grids: torch.Tensor) -> None:
    """Raises UsageError unless patches and grids are a processor's, and fit one another and the tower `visual`."""
    width, merge = visual.patch_embed.proj.weight[0].numel(), visual.config.spatial_merge_size
    good = isinstance(pixels, torch.Tensor) and pixels.is_floating_point() and pixels.shape[1:] == (width,)
    if not good:
        raise UsageError(f"pixel_values_videos are {_what(pixels)}, not floating-point [patches, {width}]", PROCESSOR)
    good = isinstance(grids, torch.Tensor) and not (grids.is_floating_point() or grids.dtype == torch.bool)
    if not (good and grids.ndim == 2 and grids.shape[1] == 3):
        raise UsageError(f"video_grid_thw are {_what(grids)}, not int64 [videos, 3]", PROCESSOR)
    shapes = grids.tolist()
    if any(min(shape) < 1 or shape[1] % merge or shape[2] % merge for shape in shapes):
        raise UsageError(f"video_grid_thw {shapes} are not (T, H, W), H and W in multiples of {merge}", PROCESSOR)
    if not shapes or int(grids.prod(1).sum()) != len(pixels):
        raise UsageError(f"{len(pixels)} patches do not fit video_grid_thw {shapes}", PROCESSOR)
    if not all_numbers(pixels.detach()):
        raise UsageError("pixel_values_videos hold NaN or infinity", "look at what the processor was given")


def seconds_of(seconds: float | Sequence[float], videos: int) -> list[float]:
    """Seconds per pair of each video. Raises UsageError: neither a number nor one for each video, or one that is no time."""
    if hasattr(seconds, "tolist"):  # a tensor or array
        seconds = seconds.tolist()
    each = list(seconds) if isinstance(seconds, list | tuple) else [seconds] * videos
    numbers = all(isinstance(x, Real) and not isinstance(x, bool) and isfinite(x) and x >= 0 for x in each)
    if not numbers or len(each) != videos:
        hint = "pass the processor's second_per_grid_ts"
        raise UsageError(f"seconds_per_pair {seconds!r} are not one number, or one for each of {videos} videos", hint)
    return each


def check_question(visual, question: torch.Tensor | None) -> None:
    """Raises UsageError: neither None nor floating-point `[Q, hidden]`, as wide as the tokens of `visual`, and Q at least 1."""
    if question is None:
        return
    width = vision_sizes(visual.config).out_hidden_size
    good = isinstance(question, torch.Tensor) and question.is_floating_point() and question.ndim == 2
    if not (good and len(question) and question.shape[1] == width):
        hint = "pass model.get_input_embeddings()(ids), ids being the question's tokens as a tensor of one dimension"
        raise UsageError(f"the question is {_what(question)}, not floating-point [tokens, {width}]", hint)


def _what(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"of type {type(value).__name__}"
