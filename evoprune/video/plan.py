"""What of a video will be looked at: which moments, at which size, within every limit. Numbers only, no torch, no files."""

import math
from dataclasses import dataclass, replace

from evoprune.errors import VideoError
from evoprune.video.probe import VideoInfo
from evoprune.video.sampling import SamplingPlan, check_sampling, plan_sampling

# Visual tokens before pruning: Qwen2.5-VL's own limit for a video, and what a CPU gets through in about a minute.
MAX_VISUAL_TOKENS = 24_576
MAX_VISUAL_TOKENS_CPU = 4_096


def default_max_visual_tokens(*, on_cpu: bool, is_demo: bool) -> int:
    """A real model on a CPU would be at it for many minutes, so it gets less to look at."""
    return MAX_VISUAL_TOKENS_CPU if on_cpu and not is_demo else MAX_VISUAL_TOKENS


@dataclass(frozen=True)
class VideoLimits:
    """How a model wants its video: which frames, how large, normalised how. The defaults are Qwen2.5-VL's own for video.

    Attributes:
        min_pixels, max_pixels: area of one frame after resizing.
        fps: frames a second to take.
        min_frames, max_frames: bounds on their number.
        image_mean, image_std: of the red, green and blue channel, values in 0..1.
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames in a grid.
        merge_size: side of a merge unit in patches.
    """

    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2

    @property
    def unit(self) -> int:
        """Side of a merge unit in pixels."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class Plan:
    """What will be looked at.

    Attributes:
        sampling: the moments.
        height, width: of the frames after resizing, in pixels.
        grid: (T, H, W) in merge units.
        frame_limit: the most frames that the model, or the caller instead, allows; more may be `sampling.wanted`.
        token_limit: the most visual tokens.
        capped: whether the token limit made frames smaller or fewer than the model's own limits ask for.
    """

    sampling: SamplingPlan
    height: int
    width: int
    grid: tuple[int, int, int]
    frame_limit: int
    token_limit: int
    capped: bool

    @property
    def visual_tokens(self) -> int:
        """N, before pruning."""
        t, h, w = self.grid
        return t * h * w

    def shrunk(self, grid: tuple[int, int, int], limits: VideoLimits) -> "Plan":
        """The same part of the video on another grid: so many frames spread over it, resized to so many units."""
        count, height, width = grid
        sampling = self.sampling.thinned(count * limits.temporal_patch_size)
        return replace(self, sampling=sampling, height=height * limits.unit, width=width * limits.unit, grid=grid)


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int, factor: int = 28) -> tuple[int, int]:
    """The frame size that Qwen2.5-VL sees: multiples of `factor`, area within limits, aspect ratio nearly kept.

    The area wins over the ratio (Qwen2-VL, arXiv 2409.12191, naive dynamic resolution).

    Raises:
        ValueError: a side is not positive, or one is more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise ValueError(f"cannot resize {width}x{height}: sides must be positive and within a ratio of 200")
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
    info: VideoInfo,
    limits: VideoLimits,
    *,
    fps: float | None = None,
    frames: int | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    max_frames: int | None = None,
    max_visual_tokens: int = MAX_VISUAL_TOKENS,
) -> Plan:
    """Moments and frame size for a video, within the model's limits and the token limit.

    Where there would be more than `max_visual_tokens`, frames become smaller, down to the model's smallest; then fewer; and where
    even two of them are too many, smaller still.

    Args:
        info: the video.
        limits: the model's.
        fps, frames: frames a second, or in all; default: the model's rate.
        start_s, end_s: the part to look at.
        max_frames: instead of the model's limit.
        max_visual_tokens: limit before pruning, at least 1.

    Raises:
        VideoError: no length, nothing in the part, or a shape that cannot be resized. UsageError: numbers that make no sense.
    """
    check_sampling(
        fps=fps, frames=frames, start_s=start_s, end_s=end_s, max_frames=max_frames, max_visual_tokens=max_visual_tokens
    )
    if info.duration_s is None:
        raise VideoError(f"cannot tell how long {info.path} is", "re-encode it, e.g. with ffmpeg -i IN OUT.mp4")

    def sample(most: int) -> SamplingPlan:
        return plan_sampling(
            info.duration_s,
            fps=limits.fps if fps is None else fps,
            frames=frames,
            start_s=start_s,
            end_s=end_s,
            min_frames=limits.min_frames,
            max_frames=most,
        )

    unit, pair = limits.unit, limits.temporal_patch_size
    most_frames = limits.max_frames if max_frames is None else max_frames
    # No more grids than there may be tokens: what nobody will look at needs no place in a list.
    sampling = free = sample(min(most_frames, pair * max_visual_tokens))
    try:
        wished = smart_resize(info.height, info.width, limits.min_pixels, limits.max_pixels, unit)
        height, width = wished
        grids = sampling.frames // pair
        if grids * _units(wished, unit) > max_visual_tokens:
            least = min(limits.min_pixels, limits.max_pixels)
            most = max(least, max_visual_tokens * unit**2 // grids)
            height, width = smart_resize(info.height, info.width, least, most, unit)
        if grids * _units((height, width), unit) > max_visual_tokens:
            grids = max(1, max_visual_tokens // _units((height, width), unit))
            sampling = sample(grids * pair)
        if grids * _units((height, width), unit) > max_visual_tokens:
            small = smart_resize(info.height, info.width, 1, max_visual_tokens * unit**2, unit)
            height, width = _within(*small, unit, max_visual_tokens)
    except ValueError as problem:
        raise VideoError(f"{info.path}: {problem}", "crop it first", stage="preprocess") from None
    grid = (sampling.frames // pair, height // unit, width // unit)
    wanted = min(free.wanted, most_frames - most_frames % pair)
    capped = (height, width) != wished or sampling.frames < wanted
    return Plan(sampling, height, width, grid, most_frames, max_visual_tokens, capped)


def _units(size: tuple[int, int], unit: int) -> int:
    return (size[0] // unit) * (size[1] // unit)


def _within(height: int, width: int, unit: int, most: int) -> tuple[int, int]:
    """Cuts the longer side of a very long picture until it has at most `most` units."""
    rows, cols = height // unit, width // unit
    if rows <= cols:
        cols = min(cols, most // rows)
    else:
        rows = min(rows, most // cols)
    return rows * unit, cols * unit
