"""Data classes that describe an input.

`Video` holds metadata of a video or still image, `ScanResult` the results of decoding the whole video, and `Subtitles` the
subtitles from its tracks or from files next to it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from evoprune.errors import UsageError, VideoError
from evoprune.util import clock

if TYPE_CHECKING:
    pass

WIDEST_PIXEL = (
    10.0  # a stated pixel aspect ratio above this (or below its inverse) is ignored: the pixels are read as square
)
SAME_SHAPE = 0.02  # two aspect ratios count as equal up to this relative difference
# Values of `Video.container` for animations that Pillow reads (readers/animation.py), by Pillow's name of the format.
ANIMATIONS = {"WEBP": "webp", "AVIF": "avif"}
Kind = Literal["video", "picture"]  # kinds of input that a model distinguishes
FOLDER_FPS = 2.0  # default rate of a folder of images; frames for Qwen2.5-VL are usually extracted at this rate
# HDR formats: two transfer curves, and the unsupported Dolby Vision format (profile 5).
PQ = "PQ"
HLG = "HLG"
IPT = "IPTPQc2"
# Whether to move a time to the nearest keyframe in its part of the video: if that saves much time, never, or whenever possible.
Seek = Literal["auto", "exact", "keyframes"]
SEEKS = get_args(Seek)
# Libraries that read videos; "auto" lets evoprune choose.
Decoder = Literal["auto", "pyav", "decord"]
# File extensions of clips: MP4, or Matroska if players do not expect the codecs in an MP4.
CLIP_ENDINGS = (".mp4", ".mkv")

SubtitleLine = tuple[float, float, str]  # start and end in seconds from the first frame, and the text


@dataclass(frozen=True)
class Video:
    """Metadata of a video file, of a folder of images that is read as a video, or of a still image (which has no times).

    A field is None if the file does not state the value, or if only a scan can find it. Times are in seconds from the first frame.
    """

    path: str
    duration_s: float | None  # time at which the last frame ends
    width: int  # pixels as displayed, after rotation and with square pixels
    height: int
    rotation_deg: int  # clockwise, from stored to displayed frames: 0, 90, 180 or 270
    codec: str  # such as `h264`; for a folder, the codec of its first image
    pix_fmt: str | None  # such as `yuv420p`
    container: str  # FFmpeg's name of the format, such as `matroska,webm`; otherwise `folder`, `picture` or `array`
    fps: float | None = None  # average frame rate
    variable_rate: bool | None = None  # whether the frame intervals differ
    frames_total: int | None = None
    start_s: float = 0.0  # the file's own timestamp of the first frame
    tags: dict[str, str] = field(default_factory=dict)  # tags of the container, or the comment in a still image
    # Pixels cropped from stored frames on the left, right, top and bottom, before rotation.
    crop: Sequence[int] | None = None
    mirrored: bool = False  # whether stored frames are flipped left to right before rotation
    stated_s: float | None = (
        None  # duration that the file states for the video track; exceeds `duration_s` if it is cut off
    )
    rate_guessed: bool = False  # whether `fps` is a guess, as for a raw stream that does not state its rate
    clock_restarts: int = (
        0  # number of times the file's clock restarts, as in joined files; times here continue across restarts
    )
    joined: bool = False  # whether another file was appended (`cat a.mp4 b.mp4`); its content may not be read
    clock_gap_s: float = 0.0  # largest forward jump that counts as a restart of the clock
    hdr: bool = False  # whether frames are mapped from HDR to SDR when read
    hdr_format: str | None = None  # `PQ`, `HLG` or `IPTPQc2`; None for SDR
    interlaced: bool = False  # whether the first frame is interlaced; all interlaced frames are deinterlaced when read
    # Width / height of the stored pixels, before rotation, or None if they are square. Ignored if more extreme than `WIDEST_PIXEL`.
    pixel_aspect: float | None = None
    other_tracks: int = 0  # number of additional video tracks, which are not read
    has_sound: bool = False  # whether there is a sound track

    @property
    def warnings(self) -> list[str]:
        """Names of the warnings about differences between what the model sees and what a player shows."""
        flags = {
            "hdr_video": self.hdr,
            "interlaced_video": self.interlaced,
            "stretched_video": self.pixel_aspect and not 1 / WIDEST_PIXEL <= self.pixel_aspect <= WIDEST_PIXEL,
            "other_tracks": self.other_tracks,
            "guessed_rate": self.rate_guessed,
            "clock_gap": self.clock_gap_s,
            "joined_files": self.joined,
        }
        return [name for name, true in flags.items() if true]

    @property
    def kind(self) -> Kind:
        return "picture" if self.is_picture else "video"

    @property
    def is_picture(self) -> bool:
        return self.container == "picture"

    @property
    def is_animation(self) -> bool:
        """True for an animation that Pillow reads. FFmpeg reads all others."""
        return self.container in ANIMATIONS.values()

    @property
    def is_file(self) -> bool:
        """True for a file or a folder, False for frames that a Python program holds."""
        return True

    @property
    def length_s(self) -> float:
        """`duration_s` if it is known. Otherwise raises VideoError."""
        if self.duration_s is None:
            raise VideoError(f"the duration of {self.path} is unknown", "re-encode it, e.g. with ffmpeg -i IN OUT.mp4")
        return self.duration_s

    def span(self, start_s: float = 0.0, end_s: float | None = None) -> tuple[float, float]:
        """Return the start and end of a span, in seconds. Raises VideoError if the span is empty or the duration is unknown.

        Args:
            start_s, end_s: Limits of the span; see `SamplingOptions`.
        """
        return span_of(self.length_s, start_s, end_s)

    def frames_at_once(self, chunk_bytes: int) -> int:
        """Return how many frames fit into a chunk of `chunk_bytes`, rounded down to an even number. At least 2."""
        return max(2, chunk_bytes // (self.width * self.height * 3) // 2 * 2)

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) to which a frame of a different size is scaled so that it fits into a frame of this video."""
        return fitted((width, height), (self.width, self.height))

    @property
    def cut_short(self) -> bool:
        """True if the end of the video is missing. Differences up to 0.5 s or 2% are ignored as differences in counting."""
        if self.stated_s is None or self.duration_s is None:
            return False
        return self.stated_s - self.duration_s > max(0.5, 0.02 * self.stated_s)


def span_of(duration_s: float, start_s: float = 0.0, end_s: float | None = None) -> tuple[float, float]:
    """Return the start and end of a span of a video, in seconds.

    Args:
        duration_s: Length of the video in seconds.
        start_s, end_s: Limits of the span; see `SamplingOptions`.

    Raises:
        VideoError: The span is empty, or the duration is not a finite number above 0.
    """
    if not 0 < duration_s < math.inf:
        raise VideoError(f"the video has no usable duration ({duration_s} s)")
    start = start_s if start_s >= 0 else max(0.0, duration_s + start_s)
    end = duration_s if end_s is None else end_s
    if end < 0:
        end += duration_s
    end = min(end, duration_s)
    video = f"the video, which is {duration_s:g} s long"
    if start >= duration_s:
        raise VideoError(f"start {start_s:g} s is after the end of {video}", "choose an earlier start")
    if end <= start:
        hint = "choose an end after the start; negative times count from the video's end"
        raise VideoError(f"nothing between start {start_s:g} s and end {end_s:g} s of {video}", hint)
    return start, end


def fitted(size: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (width, height) that fits into `outer` and has the aspect ratio of `size`.

    If the two aspect ratios are nearly equal (`SAME_SHAPE`), `outer` itself is returned.
    """
    across = size[0] * outer[1]
    down = size[1] * outer[0]
    if abs(across - down) <= SAME_SHAPE * down:
        return outer
    if across > down:
        return outer[0], max(1, round(outer[0] * size[1] / size[0]))
    return max(1, round(outer[1] * size[0] / size[1])), outer[1]


@dataclass(frozen=True)
class ScanResult:
    """Results of decoding a whole video. `duration_s` and `stated_s` are defined as in `Video`.

    Some containers, such as Matroska, hide damage. Damage then shows only as a `duration_s` that is shorter than `stated_s`.
    """

    frames: int
    damaged: int  # number of packets (in a folder: images) that were skipped or patched up
    duration_s: float
    stated_s: float | None
    variable_rate: bool  # whether more frame intervals are irregular than the damage explains
    largest_gap_s: float  # largest interval between two frames; 0 for a single frame
    keyframe_median_s: float  # median interval between keyframes, counting the one from the last keyframe to the end
    keyframe_max_s: float
    seconds: float


@dataclass(frozen=True)
class FrameTimes:
    """Display times of all frames of a video."""

    times_s: list[float]  # seconds from the first frame, ascending
    stated: int  # number of frames stated in the header, or 0 if the header does not state it


@dataclass(frozen=True)
class Subtitles:
    """Subtitles of a video.

    The warning "subtitles_encoding" indicates that the file's encoding was guessed to be cp1252. The warning "damaged_subtitles"
    indicates that lines may be missing.
    """

    source: str | None = None  # the subtitle file, or the track in the video; None if there are no subtitles
    lines: list[SubtitleLine] = field(default_factory=list)  # sorted by start time, without markup and line breaks
    warnings: list[str] = field(default_factory=list)
    note: str | None = None  # the reason why there are no subtitles
    speech: str | None = None  # the speech model that transcribed the lines, or None for real subtitles
    language: str | None = None  # code of the spoken language, such as `en`, or None if nothing was transcribed

    def fitted(self, max_tokens: int, count_tokens: Callable[[str], int]) -> "PromptSubtitles":
        """Choose as many lines for the prompt as fit into `max_tokens`, spread evenly over all lines.

        Lines are never cut. A line that exceeds the limit on its own is left out.

        Args:
            count_tokens: Function that returns the number of tokens in a string.
        """
        longest = 16 * max_tokens  # characters; tokenizing a longer text might take minutes
        lines = [line for line in self.lines if len(line[2]) <= longest]
        # Bisect the number of lines. Each line takes more than one token, so `max_tokens + 1` lines cannot fit.
        fits = 0
        too_many = min(len(lines), max_tokens) + 1
        text = ""
        tokens = 0
        while too_many - fits > 1:
            count = (fits + too_many) // 2
            # The middle line of each of `count` equal parts.
            middles = [(2 * i + 1) * len(lines) // (2 * count) for i in range(count)]
            block = as_text([lines[i] for i in middles])
            needed = max_tokens + 1
            if len(block) <= longest:
                needed = count_tokens(block)
            if needed <= max_tokens:
                fits = count
                text = block
                tokens = needed
            else:
                too_many = count
        how = (self.source, len(self.lines), fits, tokens, tuple(self.warnings), self.note)
        return PromptSubtitles(text, *how, self.speech, self.language)


@dataclass(frozen=True)
class PromptSubtitles:
    """The part of a video's `Subtitles` that goes into the prompt."""

    text: str = ""  # precedes the question; empty without subtitles
    source: str | None = None
    lines: int = 0  # number of lines in the sampled span of the video
    lines_in_prompt: int = 0
    tokens: int = 0  # number of tokens of `text`
    warnings: tuple[str, ...] = ()
    note: str | None = None
    speech: str | None = None
    language: str | None = None

    def record(self) -> dict[str, Any] | None:
        if self.source is None:
            return None
        return {name: getattr(self, name) for name in RECORDED}


# fields of `PromptSubtitles` in records
RECORDED = ("source", "lines", "lines_in_prompt", "tokens", "speech", "language")


def as_text(lines: Sequence[SubtitleLine]) -> str:
    """Join subtitle lines into a block of text that begins with a title and ends with an empty line.

    Each line begins with its start time, rounded down to a full second.
    """
    times = [clock(max(0, int(start))).removesuffix(".0") for start, _, _ in lines]
    return "\n".join(
        ["Subtitles:", *(f"[{time}] {text}" for time, (_, _, text) in zip(times, lines, strict=True)), "", ""]
    )


def check_seek(seek: str) -> None:
    """Raise UsageError if `seek` is not one of `SEEKS`."""
    if seek not in SEEKS:
        raise UsageError(f"unknown seek {seek!r}", f"use {', '.join(SEEKS)}")
