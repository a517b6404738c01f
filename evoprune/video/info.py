"""Data classes that describe an input video or image.

`Video` contains the metadata of a video or still image, `ScanResult` contains the results of decoding an entire video, and
`Subtitles` contains subtitles from one of the video's tracks or from a file next to the video.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from evoprune.errors import UsageError, VideoError
from evoprune.util import clock

# If a file specifies a pixel aspect ratio above this value or below its inverse, the ratio is ignored, and the pixels are treated
# as square.
WIDEST_PIXEL = 10.0
SAME_SHAPE = 0.02  # maximum relative difference at which two aspect ratios are treated as equal
# Maps Pillow's names for the animation formats read with Pillow (readers/animation.py) to values of `Video.container`.
ANIMATIONS = {"WEBP": "webp", "AVIF": "avif"}
Kind = Literal["video", "picture"]  # input types that models treat differently
# Default frame rate for a folder of images, because frames for Qwen2.5-VL are usually extracted at this rate.
FOLDER_FPS = 2.0
ROUNDED_S = 0.000501  # slightly more than the rounding error of timestamps in Matroska, which rounds to milliseconds
TOLERANCE_S = 0.0006  # maximum tolerance (see `Video.tolerance_s`)
FOLDER = "folder"  # value of `Video.container` for a folder of images
PICTURE = "picture"  # value of `Video.container` for a still image
MAX_TIMES = 2**21  # maximum number of times in a single request for frames; as text, they take at most 54 MB
AUDIO_RATE = 16_000  # samples per second of the audio for speech recognition
# HDR formats: two transfer curves, and Dolby Vision's proprietary format (profile 5), which is not supported.
PQ = "PQ"
HLG = "HLG"
IPT = "IPTPQc2"
# When to read the nearest keyframe instead of the exact frame: only if that saves a lot of time ("auto"), never ("exact"), or
# whenever possible ("keyframes").
Seek = Literal["auto", "exact", "keyframes"]
SEEKS = get_args(Seek)
# Libraries that can decode videos. With "auto", evoprune chooses one.
Decoder = Literal["auto", "pyav", "decord"]
# File extensions of clips. Matroska is used for codecs that players do not expect in an MP4.
CLIP_ENDINGS = (".mp4", ".mkv")

SubtitleLine = tuple[float, float, str]  # start and end in seconds from the first frame, and text


@dataclass(frozen=True)
class Video:
    """Metadata of a video file, a folder of images treated as a video, or a still image.

    A field is None if the file does not specify its value, if only a scan of the entire video could determine it, or if the input
    is a still image and the field does not apply. Times are in seconds from the first frame.
    """

    path: str
    duration_s: float | None  # end time of the last frame
    width: int  # in pixels, as displayed: after rotation, and with square pixels
    height: int
    rotation_deg: int  # clockwise rotation from stored to displayed frames: 0, 90, 180, or 270
    codec: str  # codec name, such as `h264`; for a folder, the codec of its first image
    pix_fmt: str | None  # pixel format, such as `yuv420p`
    # FFmpeg's name for the file format, such as `matroska,webm`; otherwise `folder`, `picture`, or `array`.
    container: str
    fps: float | None = None  # average frame rate
    variable_rate: bool | None = None  # whether the time between consecutive frames varies
    frames_total: int | None = None
    start_s: float = 0.0  # the file's own timestamp of the first frame
    tags: dict[str, str] = field(default_factory=dict)  # the container's tags, or a still image's comment
    # Number of pixels to crop from the left, right, top, and bottom of a stored frame, before rotation.
    crop: Sequence[int] | None = None
    mirrored: bool = False  # whether to flip stored frames left to right, before rotation
    # Duration of the video track according to the file header; longer than `duration_s` if the file is truncated.
    stated_s: float | None = None
    # Whether `fps` is a guess, because the file is a raw stream without a specified frame rate.
    rate_guessed: bool = False
    # Number of times that the file's clock restarts, as it does in concatenated files. Times in evoprune continue across restarts.
    clock_restarts: int = 0
    # Whether another file was appended to this one (`cat a.mp4 b.mp4`); the appended file may not be read.
    joined: bool = False
    clock_gap_s: float = 0.0  # largest forward jump in the timestamps interpreted as a clock restart
    hdr: bool = False  # whether frames are converted from HDR to SDR when they are read
    hdr_format: str | None = None  # `PQ`, `HLG`, or `IPTPQc2`; None for SDR
    # Whether the first frame is interlaced. All interlaced frames are deinterlaced when they are read.
    interlaced: bool = False
    # Width of a stored pixel divided by its height, before rotation. None means square pixels. Ignored if beyond `WIDEST_PIXEL`.
    pixel_aspect: float | None = None
    other_tracks: int = 0  # number of additional video tracks, which are ignored
    has_sound: bool = False  # whether there is an audio track

    @property
    def warnings(self) -> list[str]:
        """Names of warnings about ways in which the frames that the model sees may differ from a media player's display."""
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
        return self.container == PICTURE

    @property
    def is_folder(self) -> bool:
        """True for a folder of images treated as a video."""
        return self.container == FOLDER

    @property
    def is_file(self) -> bool:
        """True for a file or a folder, False for an array of frames in memory."""
        return True

    @property
    def length_s(self) -> float:
        """Duration in seconds. Unlike `duration_s`, this property raises VideoError if the duration is unknown."""
        if self.duration_s is None:
            raise VideoError(f"the duration of {self.path} is unknown", "re-encode it, e.g. with ffmpeg -i IN OUT.mp4")
        return self.duration_s

    @property
    def tolerance_s(self) -> float:
        """How long after a requested time a frame may start and still be considered to be on screen, in seconds.

        The tolerance makes up for rounded timestamps. It shrinks at more than 450 frames per second: a request for the middle of a
        frame must not return the next frame, which starts half a frame later, or earlier if its timestamp was rounded down.
        """
        if not self.fps:
            return TOLERANCE_S
        return min(TOLERANCE_S, max(0.5 / self.fps - ROUNDED_S, 0.01 / self.fps))

    def frames_at_once(self, chunk_bytes: int) -> int:
        """Return the number of frames that fit in a chunk of `chunk_bytes`, rounded down to an even number, but at least 2."""
        return max(2, chunk_bytes // (self.width * self.height * 3) // 2 * 2)

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) to which a frame of a different size must be scaled to fit inside this video's frames."""
        return fitted((width, height), (self.width, self.height))

    @property
    def cut_short(self) -> bool:
        """True if the file appears to be truncated.

        This is the case if the duration specified in the file exceeds the actual duration by more than 0.5 s and by more than 2%.
        """
        if self.stated_s is None or self.duration_s is None:
            return False
        return self.stated_s - self.duration_s > max(0.5, 0.02 * self.stated_s)


def is_held(value: Any) -> bool:
    """Return True if a value is a `HeldVideo`, whose frames are in memory."""
    return isinstance(value, Video) and not value.is_file


def span_of(duration_s: float, start_s: float = 0.0, end_s: float | None = None) -> tuple[float, float]:
    """Resolve a user-specified time span to start and end times in seconds from the first frame.

    Args:
        duration_s: Length of the video in seconds.
        start_s, end_s: Start and end as specified by the user. See `SamplingOptions` for the meaning of negative values and None.

    Raises:
        VideoError: The span is empty, or the duration is not finite and positive.
    """
    if not 0 < duration_s < math.inf:
        hint = "check the frame rate, or re-encode it, e.g. with ffmpeg -i IN OUT.mp4"
        raise VideoError(f"the video has no usable duration ({duration_s} s)", hint)
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
    """Return the largest (width, height) that fits inside `outer` and has the same aspect ratio as `size`.

    If the aspect ratios of `size` and `outer` are nearly equal (see `SAME_SHAPE`), `outer` itself is returned.
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
    """Results of decoding an entire video. `duration_s` and `stated_s` have the same meanings as in `Video`.

    Some containers, such as Matroska, do not indicate damaged packets. In that case, the only sign of damage is that `duration_s`
    is shorter than `stated_s`.
    """

    frames: int
    damaged: int  # number of packets (or images, in a folder) that were skipped or repaired
    duration_s: float
    stated_s: float | None
    variable_rate: bool  # whether there are more irregular frame intervals than the damage can explain
    largest_gap_s: float  # longest interval between two frames; 0 if there is only one frame
    # Median interval between keyframes, including the interval from the last keyframe to the end.
    keyframe_median_s: float
    keyframe_max_s: float
    seconds: float


@dataclass(frozen=True)
class FrameTimes:
    """Display times of all frames in a video."""

    times_s: list[float]  # seconds from the first frame, ascending
    stated: int  # number of frames according to the header, or 0 if not specified


@dataclass(frozen=True)
class Subtitles:
    """Subtitles of a video, or its transcribed speech.

    `warnings` contains "subtitles_encoding" if the file has an unknown encoding that was assumed to be cp1252, and
    "damaged_subtitles" if lines or characters may be missing.
    """

    source: str | None = None  # name of the subtitle file or text track; None if there are no subtitles
    lines: list[SubtitleLine] = field(default_factory=list)  # sorted by start time, with markup and line breaks removed
    warnings: list[str] = field(default_factory=list)
    note: str | None = None  # reason why there are no subtitles
    speech: str | None = None  # speech model that transcribed the lines; None for existing subtitles
    language: str | None = None  # spoken language code, such as `en`; None if nothing was transcribed

    def fitted(self, max_tokens: int, count_tokens: Callable[[str], int]) -> "PromptSubtitles":
        """Select as many lines for the prompt as fit in `max_tokens`, spread evenly over all lines.

        Lines are never truncated, so a single line that exceeds the limit is left out.

        Args:
            max_tokens: Maximum total number of tokens in the selected lines.
            count_tokens: Function that counts the tokens in a string.
        """
        longest = 16 * max_tokens  # in characters; tokenizing longer text could take minutes
        lines = [line for line in self.lines if len(line[2]) <= longest]
        # Find the number of lines by bisection. Every line takes more than one token, so `max_tokens + 1` lines cannot fit.
        fits = 0
        too_many = min(len(lines), max_tokens) + 1
        text = ""
        tokens = 0
        while too_many - fits > 1:
            count = (fits + too_many) // 2
            # Divide the lines into `count` equal parts and take the middle line of each part.
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
        return PromptSubtitles(
            text=text,
            source=self.source,
            lines=len(self.lines),
            lines_in_prompt=fits,
            tokens=tokens,
            warnings=tuple(self.warnings),
            note=self.note,
            speech=self.speech,
            language=self.language,
        )


@dataclass(frozen=True)
class PromptSubtitles:
    """The subtitle lines selected for the prompt, along with statistics about the selection."""

    text: str = ""  # placed before the question; empty if there are no subtitles
    source: str | None = None
    lines: int = 0  # number of lines in the sampled span of the video
    lines_in_prompt: int = 0
    tokens: int = 0  # number of tokens in `text`
    warnings: tuple[str, ...] = ()
    note: str | None = None
    speech: str | None = None
    language: str | None = None

    def record(self) -> dict[str, Any] | None:
        if self.source is None:
            return None
        return {name: getattr(self, name) for name in RECORDED}


# `PromptSubtitles` fields to include in records.
RECORDED = ("source", "lines", "lines_in_prompt", "tokens", "speech", "language")


def as_text(lines: Sequence[SubtitleLine]) -> str:
    """Format subtitle lines as a block of text with the heading "Subtitles:" and a trailing blank line.

    Each line is preceded by its start time, rounded down to a whole second.
    """
    times = [clock(max(0, int(start))).removesuffix(".0") for start, _, _ in lines]
    return "\n".join(
        ["Subtitles:", *(f"[{time}] {text}" for time, (_, _, text) in zip(times, lines, strict=True)), "", ""]
    )


def check_seek(seek: str) -> None:
    """Raise UsageError if `seek` is not a valid seek option (see `SEEKS`)."""
    if seek not in SEEKS:
        raise UsageError(f"unknown seek {seek!r}", f"use {', '.join(SEEKS)}")
