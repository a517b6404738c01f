"""Which frames a model sees, and how large: sampling times and frame size within all limits. Numbers only, no files."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from evoprune.errors import UsageError, VideoError
from evoprune.model.rules import list_of, number, whole
from evoprune.pruning.encoder_plan import EncoderPlan, Grid
from evoprune.video.info import NOTHING_SAID, PICTURE, VIDEO, PromptSubtitles, Video
from evoprune.video.sampling import SamplingPlan, check_sampling, plan_sampling

# Visual tokens before pruning: Qwen2.5-VL's own limit for a video, and what a CPU encodes in about a minute.
MAX_VISUAL_TOKENS = 24_576
MAX_VISUAL_TOKENS_CPU = 4_096
# Units of a frame where a model limits all frames together: Qwen's own limit, without which four frames would share all of it.
MAX_FRAME_TOKENS = 768

# How a picture is looked at: once. Its length stands for the second to the next frame pair, which does not exist.
STILL = SamplingPlan(0.0, 0.5, (0.0,), 1)

Area = Annotated[int, whole(1, 2**31)]
Means = Annotated[tuple[float, float, float], list_of(number(-1000, 1000), 3)]
Deviations = Annotated[tuple[float, float, float], list_of(number(1e-6, 1000), 3)]


def default_max_visual_tokens(*, on_cpu: bool, is_demo: bool) -> int:
    """The limit before pruning. A real model on a CPU gets a lower one: more would take many minutes."""
    return MAX_VISUAL_TOKENS_CPU if on_cpu and not is_demo else MAX_VISUAL_TOKENS


@dataclass(frozen=True)
class InputLimits:
    """What a model expects of a video, or of a picture: size, normalisation, frame rate. The defaults are Qwen2.5-VL's for video.

    Fields with a rule can be given by a file of the model.

    Attributes:
        min_pixels, max_pixels: area of one frame after resizing; or, with `of_all_frames`, of all frames of a video together.
        fps: frames to take per second of video.
        min_frames, max_frames: bounds on the number of frames.
        image_mean, image_std: of the red, green and blue channel, values in 0..1.
        merge_size: side of a unit in patches.
    """

    min_pixels: Area = 128 * 28 * 28
    max_pixels: Area = 768 * 28 * 28
    fps: Annotated[float, number(1e-6, 1e6)] = 2.0
    min_frames: Annotated[int, whole(0, 10**6)] = 4
    max_frames: Annotated[int, whole(2, 10**6)] = 768
    image_mean: Means = (0.48145466, 0.4578275, 0.40821073)
    image_std: Deviations = (0.26862954, 0.26130258, 0.27577711)
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    of_all_frames: bool = False

    @property
    def normal(self) -> tuple[Means, Deviations]:
        return self.image_mean, self.image_std

    @property
    def unit(self) -> int:
        """Side of a unit in pixels."""
        return self.patch_size * self.merge_size

    def of_each(self, frames: int) -> "InputLimits":
        """The limits of one frame of a video with so many."""
        if not self.of_all_frames:
            return self
        most = min(MAX_FRAME_TOKENS * self.unit**2, self.max_pixels / frames)
        return replace(self, min_pixels=self.min_pixels / frames, max_pixels=most, of_all_frames=False)


@dataclass(frozen=True)
class Plan:
    """What will be read of a video or a picture, which is one frame, and computed.

    `make_plan` sets what is looked at. `encoder` and what follows it are None, empty or False until a model has planned, too.

    Attributes:
        height, width: of the frames after resizing, in pixels.
        grid: (T, H, W): frame pairs, and rows and columns of units.
        frame_limit: the largest number of frames, by the model or the caller; `sampling.wanted` may be larger.
        token_limit: the largest number of visual tokens before pruning.
        token_capped: whether the token limit made frames smaller or fewer than the model's own limits require.
        encoder: what the encoder does with it.
        unshrunk: the plan with nothing pruned; None for this one. A method may make the input smaller.
        decoder: "pyav" or "decord"; for a picture "pillow".
        limited: whether the options ask for more frames, or a higher rate, than a limit allows, or frames became smaller for
            them. A limit on frames that the options set themselves does not count, nor does the model's own rate.
    """

    info: Video
    sampling: SamplingPlan
    height: int
    width: int
    grid: Grid
    frame_limit: int
    token_limit: int
    token_capped: bool
    encoder: EncoderPlan | None = None
    unshrunk: "Plan | None" = None
    name: str = ""
    decoder: str = ""
    limited: bool = False
    subtitles: PromptSubtitles = NOTHING_SAID

    @property
    def kind(self) -> str:
        """ "video" or "picture"."""
        return self.info.kind

    @property
    def source(self) -> Video:
        """What frames are read from: videos at their own size, pictures at the one that the encoder reads."""
        return self.info if self.kind == VIDEO else replace(self.info, width=self.width, height=self.height)

    @property
    def full(self) -> "Plan":
        """The plan with nothing pruned."""
        return self.unshrunk or self

    @property
    def units(self) -> int:
        """Visual tokens with nothing pruned."""
        return self.full.visual_tokens

    @property
    def cut_short(self) -> bool:
        """Whether what is looked at ends where the file breaks off."""
        return self.info.cut_short and self.sampling.end_s == self.info.duration_s

    @property
    def capped(self) -> bool:
        """Whether a limit, on tokens or on frames, made frames smaller or fewer than the rate or number asked for."""
        return self.token_capped or self.sampling.wanted > self.frame_limit

    @property
    def visual_tokens(self) -> int:
        """Number of units of what is looked at."""
        return math.prod(self.grid)

    def shrunk(self, grid: Grid, limits: InputLimits) -> "Plan":
        """The same span of the video on another (T, H, W): T frame pairs spread over it, resized to H x W units."""
        pairs, height, width = grid
        same = pairs == self.grid[0]
        sampling = self.sampling if same else self.sampling.thinned(pairs * limits.temporal_patch_size)
        return replace(self, sampling=sampling, height=height * limits.unit, width=width * limits.unit, grid=grid)


def smart_resize(height: int, width: int, min_pixels: float, max_pixels: float, factor: int = 28) -> tuple[int, int]:
    """The frame size that the model sees: multiples of `factor`, area within limits, aspect ratio nearly kept.

    Where both cannot be had, the area is kept and the ratio is not (Qwen2-VL, arXiv 2409.12191, naive dynamic resolution).

    Raises ValueError: a side is not positive, or one is more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise ValueError(f"cannot resize {width}x{height}: width and height must be positive and within a ratio of 200")
    rows, cols = round(height / factor), round(width / factor)
    if rows * cols * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        cols = max(1, math.floor(width / shrink / factor))
    elif rows * cols * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, cols = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, cols * factor


def make_plan(
    info: Video,
    limits: InputLimits,
    *,
    fps: float | None = None,
    frames: int | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    max_frames: int | None = None,
    max_visual_tokens: int | None = None,
) -> Plan:
    """Sampling times and frame size for a video, or a picture's size, within the model's limits and the token limit.

    If there would be more than `max_visual_tokens`, frames become smaller, down to the model's smallest; then fewer; and if
    one frame pair is still too much, smaller than the model's smallest.

    Args:
        limits: the model's, for this kind of input.
        fps, frames: frames per second, or in all; default: the model's rate. A picture has one.
        start_s, end_s: the span to sample, in seconds; below 0 from the video's end.
        max_frames: replaces the model's limit.
        max_visual_tokens: limit before pruning, at least 1; default: the model's, 24,576.

    Raises:
        VideoError: unknown duration, an empty span, or a shape that cannot be resized. UsageError: a number out of range, or a
            span of a picture.
    """
    check_sampling(
        fps=fps, frames=frames, start_s=start_s, end_s=end_s, max_frames=max_frames, max_visual_tokens=max_visual_tokens
    )
    if max_visual_tokens is None:
        max_visual_tokens = MAX_VISUAL_TOKENS
    if info.kind == PICTURE:
        if start_s != 0 or end_s is not None:
            raise UsageError(f"{info.path} is a picture, which has no start and no end", "leave out start and end")
        return _picture_plan(info, limits, max_visual_tokens)
    if info.duration_s is None:
        raise VideoError(f"cannot tell how long {info.path} is", "re-encode it, e.g. with ffmpeg -i IN OUT.mp4")
    span = {"fps": limits.fps if fps is None else fps, "frames": frames, "start_s": start_s, "end_s": end_s}
    sample = partial(plan_sampling, info.duration_s, min_frames=limits.min_frames, **span)
    pair = limits.temporal_patch_size
    most_frames = limits.max_frames if max_frames is None else max_frames
    # No more pairs than tokens are allowed, so that `times_s` stays short where `most_frames` is huge.
    sampling = free = sample(max_frames=min(most_frames, pair * max_visual_tokens))
    limits = limits.of_each(sampling.frames)
    preferred, size, pairs = _size(info, limits, sampling.frames // pair, max_visual_tokens)
    if pairs < sampling.frames // pair:
        sampling = sample(max_frames=pairs * pair)
    grid = (sampling.frames // pair, size[0] // limits.unit, size[1] // limits.unit)
    wanted = min(free.wanted, most_frames - most_frames % pair)
    token_capped = size != preferred or sampling.frames < wanted
    return Plan(info, sampling, *size, grid, most_frames, max_visual_tokens, token_capped)


def _picture_plan(info: Video, limits: InputLimits, max_tokens: int) -> Plan:
    """The size of a picture: one frame pair, of which it is both frames."""
    preferred, size, _ = _size(info, limits, 1, max_tokens)
    grid = (1, size[0] // limits.unit, size[1] // limits.unit)
    return Plan(info, STILL, *size, grid, STILL.frames, max_tokens, size != preferred)


def _size(
    info: Video, limits: InputLimits, pairs: int, max_tokens: int
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """The frame size that the model prefers; and as of `_fit`. Raises VideoError: a shape that cannot be resized."""
    try:
        preferred = smart_resize(info.height, info.width, limits.min_pixels, limits.max_pixels, limits.unit)
        return preferred, *_fit(info, limits, preferred, pairs, max_tokens)
    except ValueError as problem:
        raise VideoError(f"{info.path}: {problem}", "crop it first", stage="preprocess") from None


def _fit(
    info: Video, limits: InputLimits, size: tuple[int, int], pairs: int, max_tokens: int
) -> tuple[tuple[int, int], int]:
    """The frame size, (height, width) in pixels, and the number of frame pairs that together have at most `max_tokens` units.

    Args:
        size, pairs: without a limit on tokens.
        max_tokens: first the size is reduced, down to the model's smallest; then the pairs, down to one; then the size again.

    Raises ValueError: a shape that cannot be resized.
    """
    unit = limits.unit
    if pairs * _units(size, unit) > max_tokens:
        least = min(limits.min_pixels, limits.max_pixels)
        size = smart_resize(info.height, info.width, least, max(least, max_tokens * unit**2 // pairs), unit)
    if pairs * _units(size, unit) > max_tokens:
        pairs = max(1, max_tokens // _units(size, unit))
    if pairs * _units(size, unit) > max_tokens:
        size = _cut(*smart_resize(info.height, info.width, 1, max_tokens * unit**2, unit), unit, max_tokens)
    return size, pairs


def _units(size: tuple[int, int], unit: int) -> int:
    return (size[0] // unit) * (size[1] // unit)


def _cut(height: int, width: int, unit: int, most: int) -> tuple[int, int]:
    """Cuts the longer side of a very long picture until it has at most `most` units. In pixels."""
    rows, cols = height // unit, width // unit
    rows, cols = (rows, min(cols, most // rows)) if rows <= cols else (min(rows, most // cols), cols)
    return rows * unit, cols * unit
