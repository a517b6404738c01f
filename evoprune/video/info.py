"""What is known about a video or a picture: `Video` from its metadata, `ScanResult` from decoding all of it,
`Subtitles` from its tracks and the files beside it. And what a folder holds, by the endings of its files."""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from evoprune.errors import UsageError
from evoprune.util import file_state

if TYPE_CHECKING:
    import numpy as np

TOLERANCE_S = 1e-4  # a held frame that begins so much later than a time is on screen then
SAME_SHAPE = 0.02  # by which the ratios of width and height of frames of one shape may differ, relative
# what an input is to the model
VIDEO = "video"
PICTURE = "picture"
ARRAY = "array"  # the container of frames that a Python program holds
FOLDER_FPS = 2.0  # of a folder of images, by default: the rate at which frames for Qwen2.5-VL are usually extracted
# How HDR is stored: by one of two curves of brightness, or in the format of Dolby Vision that is not read (profile 5).
PQ = "PQ"
HLG = "HLG"
IPT = "IPTPQc2"
# Whether a time may be moved to the nearest keyframe of its part of the video: where that saves much, never, or wherever one is.
Seek = Literal["auto", "exact", "keyframes"]
SEEKS = AUTO_SEEK, EXACT, KEYFRAMES = get_args(Seek)
# What reads videos: the first is whichever serves.
Decoder = Literal["auto", "pyav", "decord"]
# What else than a file subtitles can be asked from: nowhere, or wherever there are any.
NO_SUBTITLES = "none"
AUTO_SUBTITLES = "auto"

# Of the names of clips: MP4, and Matroska where players expect something else in an MP4.
CLIP_ENDINGS = (".mp4", ".mkv")

SubtitleLine = tuple[float, float, str]  # start and end in seconds from the first frame, and what is said


@dataclass(frozen=True)
class Video:
    """Metadata of a video file, of a folder of images that is read as a video, or of a picture, which has no times.

    None is what the file does not state, or only a scan can tell. Times count from the first frame, and are in seconds.
    """

    path: str
    duration_s: float | None  # to the end of the last frame
    width: int  # pixels as displayed, after rotation; pixels that are not square are not corrected
    height: int
    rotation_deg: int  # clockwise, from stored frames to displayed ones: 0, 90, 180 or 270
    codec: str  # such as `h264`; of a folder that of its first image
    pix_fmt: str | None  # such as `yuv420p`
    container: str  # FFmpeg's name of the format, such as `matroska,webm`; or `folder`, `picture` or `array`
    fps: float | None = None  # on average
    variable_rate: bool | None = None  # whether the frame intervals differ
    frames_total: int | None = None
    start_s: float = 0.0  # the file's own timestamp of the first frame
    tags: dict[str, str] = field(default_factory=dict)  # of the container; of a picture its comment
    crop: Sequence[int] | None = (
        None  # pixels cut off stored frames on the left, right, top, bottom, before they are turned
    )
    mirrored: bool = False  # stored frames are flipped left to right before they are rotated
    stated_s: float | None = None  # the duration by the file, of the pictures alone; longer if the file was cut off
    rate_guessed: bool = False  # whether `fps` is a guess, as of a raw stream that does not state its rate
    clock_restarts: int = 0  # how often the file's clock starts anew, as in files that were joined; times here go on
    joined: bool = False  # whether another file follows inside it, which may not be read (`cat a.mp4 b.mp4`)
    clock_gap_s: float = 0.0  # the largest step ahead that counts as another clock
    hdr: bool = False  # mapped to SDR where frames are read
    hdr_format: str | None = None  # `PQ`, `HLG` or `IPTPQc2`, if it is HDR
    interlaced: bool = False
    pixel_aspect: float | None = None  # width by height of the stored pixels, where they are not square
    other_tracks: int = 0  # of moving pictures, which are not read
    has_sound: bool = False  # whether there is a track of sound, which is not read

    @property
    def warnings(self) -> list[str]:
        """Name what the model sees in another way than players show it."""
        flags = {
            "hdr_video": self.hdr,
            "interlaced_video": self.interlaced,
            "stretched_video": self.pixel_aspect,
            "other_tracks": self.other_tracks,
            "guessed_rate": self.rate_guessed,
            "clock_gap": self.clock_gap_s,
            "joined_files": self.joined,
        }
        return [name for name, true in flags.items() if true]

    @property
    def kind(self) -> str:
        return PICTURE if self.container == PICTURE else VIDEO

    @property
    def cut_short(self) -> bool:
        """Return whether the end of the video is missing. Differences up to 0.5 s or 2% come from ways of counting."""
        if self.stated_s is None or self.duration_s is None:
            return False
        return self.stated_s - self.duration_s > max(0.5, 0.02 * self.stated_s)


@dataclass(frozen=True, eq=False)
class HeldVideo(Video):
    """Frames that a Python program holds, as a video. It is equal to itself alone."""

    held: "np.ndarray" = field(kw_only=True, repr=False)  # uint8 `[T, H, W, 3]`, RGB as displayed
    frames_s: tuple[float, ...] = field(kw_only=True, repr=False)  # T times from the first frame, ascending

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def on_screen(self, times_s: Sequence[float]) -> "tuple[np.ndarray, tuple[float, ...]]":
        """Return the frames on screen at some times, uint8 `[n, H, W, 3]`, C-contiguous, and their own times."""
        begun = [bisect_right(self.frames_s, time_s + TOLERANCE_S) for time_s in times_s]
        numbers = [max(count - 1, 0) for count in begun]
        frames = self.held[numbers]
        if not frames.flags.c_contiguous:
            frames = frames.copy()
        return frames, tuple(self.frames_s[number] for number in numbers)


def fitted(size: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height of a picture of that size as large as `outer` allows; all of it where their shapes nearly
    agree.
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
    """Hold the results of decoding a video from beginning to end; `duration_s` and `stated_s` as in `Video`.

    Containers that hide their damage, such as Matroska, reveal it only by a `duration_s` below `stated_s`.
    """

    frames: int
    damaged: int  # packets (of a folder: images) that were skipped or patched up
    duration_s: float
    stated_s: float | None
    variable_rate: bool  # whether more frame intervals are irregular than damage explains
    largest_gap_s: float  # from one frame to the next; 0 for a single frame
    keyframe_median_s: float  # from a keyframe to the next one, or from the last one to the end
    keyframe_max_s: float
    seconds: float


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a video are shown."""

    times_s: list[float]  # of all of them, from the first frame, ascending
    stated: int  # how many frames there are by the header; 0 where it does not tell


@dataclass(frozen=True)
class Subtitles:
    """Subtitles of a video.

    A warning is "subtitles_encoding" if the file's encoding is a guess, cp1252; "damaged_subtitles" if there may be more lines.
    """

    source: str | None = None  # the file, or the track in the video
    lines: list[SubtitleLine] = field(default_factory=list)  # by start, each without markup and line breaks
    warnings: list[str] = field(default_factory=list)
    note: str | None = None  # why there are none


@dataclass(frozen=True)
class PromptSubtitles:
    """Hold the part of a video's `Subtitles` that the prompt has."""

    text: str = ""  # in front of the question; empty without subtitles
    source: str | None = None
    lines: int = 0  # of the part that is looked at
    lines_in_prompt: int = 0
    tokens: int = 0  # of `text`
    warnings: tuple[str, ...] = ()
    note: str | None = None

    def record(self) -> dict[str, Any] | None:
        if self.source is None:
            return None
        return {name: getattr(self, name) for name in ("source", "lines", "lines_in_prompt", "tokens")}


NOTHING_SAID = PromptSubtitles()


def check_seek(seek: str) -> None:
    """Raises UsageError: no such way to seek."""
    if seek not in SEEKS:
        raise UsageError(f"unknown seek {seek!r}", f"use {', '.join(SEEKS)}")


def check_one_file(choice: str, inputs: int) -> None:
    """Raises UsageError where one file of subtitles is given for several inputs."""
    if inputs > 1 and choice not in (NO_SUBTITLES, AUTO_SUBTITLES):
        hint = "auto takes those beside each video, or in it"
        raise UsageError(f"{choice} holds the subtitles of one video, and there are {inputs} inputs", hint)


def check_picture(info: Video, choice: str) -> None:
    """Raises UsageError where a file of subtitles is given for a picture."""
    if info.kind == PICTURE and choice not in (NO_SUBTITLES, AUTO_SUBTITLES):
        raise UsageError(f"{info.path} is a picture, which has no subtitles", "leave them out, or give the video")


IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEOS = (
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
)  # fmt: skip


SUBTITLES = (".srt", ".vtt", ".ass", ".ssa")  # of files beside a video, the preferred one first
LANGUAGE = re.compile(r"\.[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")  # between a video's name and the ending: .en, .pt-BR


def files(folder: str, endings: tuple[str, ...]) -> list[str]:
    """Paths of the files with these endings in a folder, in natural order, without hidden ones. Raises OSError, ValueError."""
    with os.scandir(folder) as entries:
        seen = [e for e in entries if e.name.lower().endswith(endings) and e.name[0] != "."]
        names = [e.name for e in seen if e.is_file(follow_symlinks=False) or os.path.isfile(e.path)]
    return [os.path.join(folder, name) for name in in_order(names)]


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names of files by the whole numbers in them: frame2 before frame10. A dash is no minus sign, and a point separates."""
    from natsort import natsorted, ns  # takes tens of milliseconds

    return natsorted(sorted(names), alg=ns.PATH | ns.IGNORECASE)


def subtitles_beside(path: str, listdir: Callable[[str], list[str]]) -> tuple[list[str], list[str]]:
    """Find the files of subtitles beside a video: first of its own name, the preferred first; then with a language added to it.

    `listdir`: as of `os`, or one that remembers. Raises OSError: the folder cannot be read.
    """
    path = os.path.normpath(path)
    folder, name = os.path.split(path)
    stem = name if os.path.isdir(path) else os.path.splitext(name)[0]
    exact = {}
    others = []
    for file in listdir(folder or "."):
        front, ending = os.path.splitext(file)
        if not file.startswith(stem) or ending.lower() not in SUBTITLES:
            continue
        if front == stem:
            exact[ending.lower()] = os.path.join(folder, file)
        elif LANGUAGE.fullmatch(front[len(stem) :]):
            others.append(os.path.join(folder, file))
    return [exact[ending] for ending in SUBTITLES if ending in exact], others


def input_state(path: str, subtitles: str, listdir: Callable[[str], list[str]] = os.listdir) -> dict[str, Any] | None:
    """Describe the files of an input (`file_state`): the video, the picture or the images of a folder, and its subtitles.

    `subtitles`: a file, none, or auto: all beside it. `listdir`: as of `subtitles_beside`. None where one cannot be found.
    """
    try:
        own = files(path, IMAGES) if os.path.isdir(path) else [path]
        if subtitles == AUTO_SUBTITLES:
            own += [file for found in subtitles_beside(path, listdir) for file in found]
        elif subtitles != NO_SUBTITLES:
            own.append(subtitles)
        return file_state(own)
    except (OSError, ValueError):
        return None
