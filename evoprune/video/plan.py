"""Plans which video frames the model sees and at what size, within the limits set by the model and the options.

Planning only does arithmetic and never opens a file. All times are in seconds from the video's first frame.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from evoprune.errors import UsageError, VideoError
from evoprune.methods import EncoderPlan, Grid, TowerShape
from evoprune.untrusted import Rule
from evoprune.util import converted, listed, option, parse_time
from evoprune.video.info import FOLDER_FPS, MAX_TIMES, Decoder, Kind, PromptSubtitles, Seek, Video, check_seek, span_of
from evoprune.video.reader_table import package_of

if TYPE_CHECKING:
    from evoprune.methods import PruneConfig

# Maximum number of units in a single frame, for models that limit only the total over all frames. Without this limit, a video with
# only four frames could use up the entire budget with huge frames. Qwen's own processor applies the same limit.
MAX_FRAME_TOKENS = 768
# Maximum size of a chunk of decoded or resized frames, in bytes. A chunk exceeds it only if two frames do not fit.
CHUNK_BYTES = 8 * 2**20

Area = Annotated[int, Rule.whole(1, 2**31)]
Means = Annotated[tuple[float, float, float], Rule.list_of(Rule.number(-1000, 1000), 3)]
Deviations = Annotated[tuple[float, float, float], Rule.list_of(Rule.number(1e-6, 1000), 3)]


def _check_at_least(min_value: int, name: str, value: float | None) -> None:
    if value is not None and not min_value <= value < math.inf:
        raise UsageError(f"{name} is {value}, not {min_value} or more", f"give a number, {min_value} or more")


@converted
@dataclass(frozen=True)
class SamplingOptions:
    """Options for sampling video frames. Raises UsageError if a value is invalid or if both `fps` and `frames` are set."""

    PANEL: ClassVar[str] = "Sampling"
    MAX_VISUAL_TOKENS: ClassVar[int] = 24_576  # Qwen2.5-VL's default limit per video, before pruning
    # Groups of options for front ends, which name the options that they accept. `SPAN` are all options that determine the span.
    RATE: ClassVar[tuple[str, ...]] = ("fps", "frames")
    SPAN: ClassVar[tuple[str, ...]] = ("start_s", "end_s")
    LIMITS: ClassVar[tuple[str, ...]] = ("max_frames", "max_visual_tokens")
    TEXT: ClassVar[tuple[str, ...]] = ("subtitles", "max_subtitle_tokens", "speech")
    # Options of functions that read frames, watch streams, or search videos.
    READING: ClassVar[tuple[str, ...]] = ("frames", "fps", *SPAN, "seek", "decoder", "frame_rate")
    WATCHING: ClassVar[tuple[str, ...]] = ("fps", "max_visual_tokens")
    SEARCHING: ClassVar[tuple[str, ...]] = ("fps", *SPAN, "speech")
    # Options of front ends that answer questions about files.
    FILES: ClassVar[tuple[str, ...]] = (*RATE, *SPAN, *LIMITS, "frame_rate", "decoder", "seek", *TEXT)

    fps: float | None = option(None, "Frames per second to sample; default: the model's rate.")
    frames: int | None = option(
        None,
        "Number of frames to sample, instead of --fps; odd numbers are rounded up.",
    )
    start_s: float = option(
        0.0,
        "Start time: 90, 1:30, 01:30:00, 1m30s, or -5 for 5 s before the end.",
        "--start",
        in_python="Start time in seconds; negative values count from the end.",
        metavar="TIME",
        typed=str,
        unless_typed="0",
        parse=parse_time,
        changes_answers=False,  # each row in a batch result contains its own span
    )
    end_s: float | None = option(
        None,
        "End time, in the same formats; default: the end.",
        "--end",
        in_python="End time in seconds; negative values count from the end; None for the end.",
        metavar="TIME",
        typed=str,
        parse=lambda text: parse_time(text) if text else None,
        changes_answers=False,
    )
    max_frames: int | None = option(None, "Maximum number of frames; default: the model's limit.")
    max_visual_tokens: int | None = option(
        None,
        "Limit before pruning: above it, frames become smaller, then fewer; default: 24576, or 4096 for real models on a CPU.",
    )
    frame_rate: float = option(
        FOLDER_FPS,
        "Frames per second of a folder of frames. Video files have their own rate.",
        in_python="Frames per second of an array or a folder of frames. Video files have their own rate.",
    )
    decoder: Decoder = option("auto", "Library that decodes the video; auto is pyav.")
    seek: Seek = option(
        "auto",
        "Which frame to take from each equal part of the video. exact: the one in the middle. keyframes: the keyframe nearest to "
        "the middle, if the part has one, which reads many times faster. auto: keyframes if that saves seconds, otherwise exact.",
    )
    subtitles: str | PathLike[str] = option(
        "none",
        "Subtitles for the prompt. auto: a file next to the video, otherwise a text track in it. FILE: SRT, WebVTT, ASS, or a "
        "video with a text track.",
        words=("none", "auto", "FILE"),
        convert=os.fspath,
    )
    max_subtitle_tokens: int = option(2048, "Limit on subtitle tokens: above it, lines are left out evenly.")

    speech: str | PathLike[str] = option(
        "none",
        "Transcribe what is said and add it to the prompt like subtitles, which take precedence: a Whisper model (tiny, base, "
        "small or large-v3-turbo), or a folder with one for CTranslate2. auto: the video's subtitles, or base if it has none. "
        "Needs evoprune[speech].",
        words=("none", "auto", "MODEL", "DIR"),
        convert=os.fspath,
    )

    def __post_init__(self):
        if self.speech != "none":
            from evoprune.video.sound import check_speech

            check_speech(self.speech)
        if not self.subtitles:
            raise UsageError("subtitles is empty", "give none, auto or a file")
        if self.max_subtitle_tokens < 1:
            raise UsageError(
                f"max_subtitle_tokens is {self.max_subtitle_tokens}, not 1 or more", "give 1 or more, or no subtitles"
            )
        check_seek(self.seek)
        if not 0 < self.frame_rate < math.inf:
            raise UsageError(f"frame_rate is {self.frame_rate:g}, not above 0", "give a number above 0")
        if self.max_visual_tokens is not None and self.max_visual_tokens < 1:
            raise UsageError(f"max_visual_tokens is {self.max_visual_tokens}, not 1 or more", "give 1 or more")
        if self.fps is not None and self.frames is not None:
            raise UsageError("fps and frames cannot be combined", "give one of the two")
        for name in self.SPAN:
            time_s = getattr(self, name)
            if time_s is not None and not math.isfinite(time_s):
                raise UsageError(
                    f"{name.removesuffix('_s')} is {time_s}, not a time in seconds",
                    "give seconds from the start, or negative seconds from the end",
                )
        _check_at_least(2, "max_frames", self.max_frames)
        _check_at_least(1, "frames", self.frames)
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UsageError(f"fps is {self.fps:g}, not above 0", "give a number above 0")

    @property
    def subtitle_file(self) -> str | None:
        """Path of the subtitle file to use, or None if `subtitles` is "none" or "auto"."""
        return None if self.subtitles in ("none", "auto") else self.subtitles

    @property
    def subtitles_wanted(self) -> str:
        """The value of `subtitles` to use when looking for subtitles.

        If `speech` is "auto", "none" is replaced with "auto", because speech is transcribed only if the video has no subtitles.
        """
        return "auto" if (self.subtitles, self.speech) == ("none", "auto") else self.subtitles

    def check_one_file(self, inputs: int) -> None:
        """Raise UsageError if a subtitle file is combined with multiple inputs."""
        if inputs > 1 and self.subtitle_file:
            hint = "auto uses the subtitles next to each video or in it"
            raise UsageError(
                f"{self.subtitle_file} has the subtitles of one video, but there are {inputs} inputs", hint
            )

    def check_picture(self, info: Video) -> None:
        """Raise UsageError if a subtitle file is given for a still image."""
        if info.is_picture and self.subtitle_file:
            raise UsageError(
                f"{info.path} is an image, which has no subtitles", "leave out the subtitles, or give the video"
            )

    @property
    def sets_frames(self) -> bool:
        """True if the options specify a frame rate or a number of frames."""
        return self.fps is not None or self.frames is not None

    def rate(self, usual: float) -> float:
        """Return the requested frame rate, or `usual` if not set. Callers ignore the result if a number of frames is set."""
        return usual if self.fps is None else self.fps

    def with_overrides(self, **own) -> "SamplingOptions":
        """Return a copy of the options with some fields replaced. Setting `fps` clears `frames`, and vice versa."""
        if own.keys() & {"fps", "frames"}:
            own = {"fps": None, "frames": None} | own
        return replace(self, **own)

    @property
    def has_span(self) -> bool:
        """True if the options limit the time span."""
        return self != self.part()

    def part(self, start_s: float = 0.0, end_s: float | None = None) -> "SamplingOptions":
        """Return a copy of the options for exactly this time span. By default, it covers the entire video."""
        usual = {name: getattr(type(self), name) for name in self.SPAN}  # the fields' defaults
        return replace(self, **usual | {"start_s": start_s, "end_s": end_s})

    def span(self, length_s: float) -> tuple[float, float]:
        """Resolve the time span for a video of this length to start and end times in seconds from its first frame.

        Raises:
            VideoError: The span is empty, or the length is not finite and positive.
        """
        return span_of(length_s, self.start_s, self.end_s)

    def check_span(self) -> None:
        """Raise UsageError if the time span is empty whatever the length of the video."""
        # A negative time counts from the end of the video, so it cannot be compared with a positive time.
        if self.end_s is not None and self.end_s <= self.start_s and (self.end_s < 0) == (self.start_s < 0):
            raise UsageError(
                f"end {self.end_s:g} s is not after start {self.start_s:g} s", "choose an end after the start"
            )

    @classmethod
    def span_names(cls, word: str) -> str:
        """Return the names of the options in `SPAN` for a message, joined with `word`, such as "start or end"."""
        return listed([name.removesuffix("_s") for name in cls.SPAN], word)

    def check_still(self, info: Video) -> None:
        """Raise UsageError if a time span is given for a still image."""
        if info.is_picture and self.has_span:
            problem = f"{info.path} is an image, which has no {self.span_names('or')}"
            raise UsageError(problem, f"leave out {self.span_names('and')}")

    def of_each(self, inputs: Sequence[Video]) -> list["SamplingOptions"]:
        """Return the options to use for each input, in the same order.

        If the inputs include both videos and still images, the time span applies only to the videos. If all inputs are still
        images, the time span is kept so that it can be reported as an error.
        """
        if all(info.is_picture for info in inputs):
            return [self] * len(inputs)
        return [self.part() if info.is_picture else self for info in inputs]


DEFAULT_SAMPLING = SamplingOptions()


@dataclass(frozen=True)
class SamplingPlan:
    """The times at which to sample frames from a span of a video.

    The span is divided into equal parts, and `times_s` contains their midpoints in ascending order. `wanted` is the number of
    frames that would have been sampled without the `max_frames` limit.
    """

    start_s: float
    end_s: float
    times_s: tuple[float, ...]
    wanted: int

    @classmethod
    def even(cls, start_s: float, end_s: float, frames: int, wanted: int | None = None) -> "SamplingPlan":
        """Plan to sample `frames` evenly spaced frames, one at the midpoint of each part. `wanted` defaults to `frames`."""
        times_s = tuple(start_s + (i + 0.5) * (end_s - start_s) / frames for i in range(frames))
        return cls(start_s, end_s, times_s, frames if wanted is None else wanted)

    @property
    def frames(self) -> int:
        """Number of frames to sample: an even number for a video, 1 for a still image."""
        return len(self.times_s)

    @property
    def seconds_per_frame(self) -> float:
        return (self.end_s - self.start_s) / self.frames

    def seconds_per_pair(self, temporal_patch: int = 2) -> float:
        """Return the interval in seconds between consecutive frame pairs, which are groups of `temporal_patch` frames."""
        return temporal_patch * self.seconds_per_frame


# The sampling plan for a still image. Its only frame lasts 0.5 s, because models expect a frame pair to last one second.
ONE_FRAME = SamplingPlan(0.0, 0.5, (0.0,), 1)


@dataclass(frozen=True)
class InputLimits:
    """A model's requirements for the size, normalization, and frame rate of videos or still images.

    The defaults are Qwen2.5-VL's values for video. Fields annotated with a rule can be overridden by a model's configuration files.
    `min_pixels` and `max_pixels` limit the area of a single frame after resizing or, if `of_all_frames` is True, the total area of
    all of a video's frames. `merge_size` is the side length of a unit in patches. `image_mean` and `image_std` contain one value
    each for the red, green, and blue channels, for pixel values between 0 and 1.
    """

    min_pixels: Area = 128 * 28 * 28
    max_pixels: Area = 768 * 28 * 28
    fps: Annotated[float, Rule.number(1e-6, 1e6)] = 2.0
    min_frames: Annotated[int, Rule.whole(0, 10**6)] = 4
    max_frames: Annotated[int, Rule.whole(2, 10**6)] = 768
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
        """Side length of a unit in pixels. A unit is a square of patches that are merged into one visual token."""
        return self.patch_size * self.merge_size

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that the model sees.

        Both sides are multiples of `unit`, the area is within the limits, and the aspect ratio is preserved as closely as possible.
        If these requirements conflict, the area limits take precedence over the aspect ratio. This is the "naive dynamic
        resolution" of Qwen2-VL (arXiv 2409.12191). The limits must apply to a single frame (see `of_each`).

        Raises:
            ValueError: A side is not positive, or one side is more than 200 times the other.
        """
        if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
            problem = f"cannot resize {width}x{height}: width and height must be positive and within a ratio of 200"
            raise ValueError(problem)
        unit = self.unit
        rows = round(height / unit)
        cols = round(width / unit)
        if rows * cols * unit**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, cols = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
        elif rows * cols * unit**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows = math.ceil(height * grow / unit)
            cols = math.ceil(width * grow / unit)
        return rows * unit, cols * unit

    def of_each(self, frames: int) -> "InputLimits":
        """Return the limits that apply to a single frame of a video from which `frames` frames are sampled."""
        if not self.of_all_frames:
            return self
        max_pixels = min(MAX_FRAME_TOKENS * self.unit**2, self.max_pixels / frames)
        return replace(self, min_pixels=self.min_pixels / frames, max_pixels=max_pixels, of_all_frames=False)


class Pruning(Protocol):
    """The pruning settings in a plan: `PruneOptions`, or a `PruneConfig`, which imports torch."""

    @property
    def resizes(self) -> bool:
        """Whether inputs may be made smaller, so that the method's plan determines which frames to read."""

    def config(self) -> "PruneConfig":
        """Return the settings that plan the encoding. Imports torch."""


@dataclass(frozen=True)
class Plan:
    """A plan of which frames to read from a video and how to encode them. A still image is treated as a single frame.

    `Plan.of` chooses the frames. `ModelDescription.plan` (session/loading/description.py) adds `tower` and `pruning`, which
    determine `encoder`.

    `limited` is True if the options request more frames or a higher frame rate than a limit allows, or if frames were made smaller
    to fit the requested number of frames. It remains False if the only limit exceeded is a frame limit set in the options, or if
    only the model's default frame rate had to be reduced.
    """

    info: Video
    sampling: SamplingPlan
    height: int  # frame height in pixels after resizing
    width: int
    grid: Grid  # (T, H, W): numbers of frame pairs, rows of units, and columns of units
    frame_limit: int  # maximum number of frames, set by the model or the caller; `sampling.wanted` may exceed it
    token_limit: int  # maximum number of visual tokens before pruning
    token_capped: bool  # whether `token_limit` resulted in smaller or fewer frames
    limited: bool = False
    tower: TowerShape | None = None  # shape of the vision tower that will encode the input
    pruning: Pruning | None = None  # None disables pruning
    unshrunk: "Plan | None" = None  # the plan without pruning, if the pruning method reduces the input size
    name: str = ""
    decoder: str = ""  # "pyav" or "decord"; "pillow" for still images and some animations, "none" for a `HeldVideo`
    seek: str = "exact"  # one of `info.SEEKS`
    read_s: tuple[float, ...] = ()  # actual frame timestamps, set after the frames have been read
    moved: bool = False  # whether any frames were replaced with nearby keyframes
    subtitles: PromptSubtitles = field(default_factory=PromptSubtitles)

    @classmethod
    def of(cls, info: Video, limits: InputLimits, options: SamplingOptions = DEFAULT_SAMPLING) -> "Plan":
        """Plan the sampling times and frame size for a video, or the image size for a still image.

        If the input would exceed `max_visual_tokens`, frames are first made smaller, down to the model's minimum size. If that is
        not enough, fewer frames are sampled. If even a single frame pair is too large, its frames are reduced below the model's
        minimum size.

        Args:
            limits: The model's limits for this kind of input (video or still image).
            options: Sampling options. If a limit is None, the model's value is used, except for `max_visual_tokens`, which defaults
                to 24,576.

        Raises:
            VideoError: The duration is unknown, the span is empty, or frames of this shape cannot be resized.
            UsageError: A time span is given for a still image.
        """
        max_tokens = options.MAX_VISUAL_TOKENS if options.max_visual_tokens is None else options.max_visual_tokens
        pair = limits.temporal_patch_size
        if info.is_picture:
            options.check_still(info)
            sampling = ONE_FRAME
            frame_limit = ONE_FRAME.frames
            wanted = ONE_FRAME.frames
            pairs = 1
        else:
            sample = partial(plan_sampling, info.length_s, options, fps=limits.fps, min_frames=limits.min_frames)
            frame_limit = limits.max_frames if options.max_frames is None else options.max_frames
            # Sample at most one frame pair per allowed token, so that `times_s` stays short even if `frame_limit` is huge.
            sampling = sample(max_frames=min(frame_limit, pair * max_tokens, MAX_TIMES))
            wanted = min(sampling.wanted, frame_limit - frame_limit % pair)
            pairs = sampling.frames // pair
            limits = limits.of_each(sampling.frames)
        try:
            preferred, grid = _fit(info, limits, pairs, max_tokens)
        except ValueError as problem:
            raise VideoError(f"{info.path}: {problem}", "crop it first", stage="preprocess") from None
        if grid[0] < pairs:
            sampling = sample(max_frames=grid[0] * pair)
        token_capped = grid[1:] != preferred or sampling.frames < wanted
        cut = token_capped or (options.max_frames is None and sampling.wanted > frame_limit)
        return cls(
            info=info,
            sampling=sampling,
            height=grid[1] * limits.unit,
            width=grid[2] * limits.unit,
            grid=grid,
            frame_limit=frame_limit,
            token_limit=max_tokens,
            token_capped=token_capped,
            limited=options.sets_frames and cut,
        )

    @cached_property
    def encoder(self) -> EncoderPlan:
        """The plan for the vision encoder, computed on first use because loading a pruning method imports torch."""
        if self.pruning is None:
            return EncoderPlan.full(self.tower, self.grid)
        return self.pruning.config().plan(self.tower, self.full.grid)

    @property
    def kind(self) -> Kind:
        return self.info.kind

    @property
    def is_picture(self) -> bool:
        return self.info.is_picture

    @property
    def source(self) -> Video:
        """Input metadata with the frame size to read: a video's original size, or the model's input size for a still image."""
        if self.is_picture:
            return replace(self.info, width=self.width, height=self.height)
        return self.info

    @property
    def read_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `frames.read_chunks` that determine which frames are read."""
        return {"decoder": self.decoder, "seek": self.seek, "part_s": self.sampling.seconds_per_frame}

    @property
    def decoder_package(self) -> str:
        """Python package of the decoder, whose version affects the frames."""
        return package_of(self.decoder)

    @property
    def chunk_bytes(self) -> int:
        """Maximum size in bytes of a chunk of decoded frames, chosen so that the resized frames also fit in `CHUNK_BYTES`."""
        pixels = self.source.width * self.source.height
        return CHUNK_BYTES * pixels // max(pixels, self.width * self.height)

    @property
    def of_pixels(self) -> "Plan":
        """A copy for use in cache keys, without the path and other fields that do not affect the input's patches."""
        return replace(
            self,
            info=replace(self.info, path=""),
            sampling=replace(self.sampling, wanted=0),
            frame_limit=0,
            token_limit=0,
            token_capped=False,
            tower=None,
            pruning=None,
            unshrunk=None,
            name="",
            limited=False,
            subtitles=PromptSubtitles(),
        )

    @property
    def full(self) -> "Plan":
        return self.unshrunk or self

    @property
    def shown_s(self) -> tuple[float, ...]:
        """Frame timestamps to pass to the model.

        These are the requested times, or the actual timestamps if any frames were replaced with nearby keyframes.
        """
        return self.read_s if self.moved else self.sampling.times_s

    @property
    def units(self) -> int:
        """Number of visual tokens without pruning."""
        return self.full.visual_tokens

    @property
    def cut_short(self) -> bool:
        """True if the file is truncated and the sampled span extends to the last available frame."""
        return self.info.cut_short and self.sampling.end_s == self.info.duration_s

    @property
    def cut_by(self) -> list[str]:
        """The options whose limits resulted in smaller frames or fewer frames than requested, with the limits."""
        limits = []
        if self.sampling.wanted > self.frame_limit:
            limits.append(f"--max-frames {self.frame_limit}")
        if self.token_capped:
            limits.append(f"--max-visual-tokens {self.token_limit}")
        return limits

    @property
    def capped(self) -> bool:
        """True if the token limit or the frame limit resulted in smaller frames or fewer frames than requested."""
        return bool(self.cut_by)

    @property
    def visual_tokens(self) -> int:
        return math.prod(self.grid)

    def shrunk(self, grid: Grid, limits: InputLimits) -> "Plan":
        """Return a plan with T frame pairs from the same span and a frame size of H x W units. `grid` is (T, H, W)."""
        pairs, height, width = grid
        sampling = self.sampling
        if pairs != self.grid[0]:
            frames = pairs * limits.temporal_patch_size
            sampling = SamplingPlan.even(sampling.start_s, sampling.end_s, frames, sampling.wanted)
        return replace(self, sampling=sampling, height=height * limits.unit, width=width * limits.unit, grid=grid)


def plan_sampling(
    duration_s: float,
    options: SamplingOptions = DEFAULT_SAMPLING,
    *,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
) -> SamplingPlan:
    """Plan to sample an even number of evenly spaced frames from a video, or from a span of the video.

    Frame i of n is sampled at t_i = start + (i + 0.5) * span / n.

    Args:
        options: The span, and the frame rate or the number of frames. The number of frames is rounded up to an even number and
            limited only by `max_frames`.
        fps: Default frame rate if the options specify neither a frame rate nor a number of frames. A frame rate is converted to the
            nearest even number of frames, at least 2, which is then limited by both `min_frames` and `max_frames`.
        min_frames, max_frames: Limits on the number of frames. An odd `min_frames` is rounded up, and an odd `max_frames` is
            rounded down. If the two limits conflict, `max_frames` takes precedence.

    Raises:
        VideoError: The span is empty.
    """
    start, end = options.span(duration_s)
    if options.frames is None:
        nearest = 2 * math.floor(min((end - start) * options.rate(fps), sys.maxsize) / 2 + 0.5)
        wanted = max(nearest, 2, min_frames + min_frames % 2)
    else:
        wanted = options.frames + options.frames % 2
    count = min(wanted, max_frames - max_frames % 2)
    return SamplingPlan.even(start, end, count, wanted)


def _fit(info: Video, limits: InputLimits, pairs: int, max_units: int) -> tuple[tuple[int, int], Grid]:
    """Return the model's preferred frame size (H, W) in units, and the largest (T, H, W) grid within the limits.

    If the grid exceeds the limits, frames are first made smaller, down to the model's minimum size. If that is not enough, the
    number of frame pairs is reduced, down to one. As a last resort, frames are made smaller than the minimum.

    Args:
        pairs: Maximum number of frame pairs (T).
        max_units: Maximum number of units in the grid (T x H x W).

    Raises:
        ValueError: Frames of this shape cannot be resized.
    """

    def units(smallest: float, largest: float) -> tuple[int, int]:
        height, width = replace(limits, min_pixels=smallest, max_pixels=largest).resized(info.height, info.width)
        return height // limits.unit, width // limits.unit

    area = limits.unit**2
    min_pixels = min(limits.min_pixels, limits.max_pixels)
    preferred = rows, cols = units(limits.min_pixels, limits.max_pixels)
    if pairs * rows * cols > max_units:
        rows, cols = units(min_pixels, max(min_pixels, max_units * area // pairs))
        pairs = min(pairs, max(1, max_units // (rows * cols)))
    if rows * cols > max_units:  # the longer side of very elongated frames must be shortened further
        rows, cols = units(1, max_units * area)
        if rows <= cols:
            cols = min(cols, max_units // rows)
        else:
            rows = min(rows, max_units // cols)
    return preferred, (pairs, rows, cols)
