"""What is known about a video or a picture: `Video` from its metadata, `ScanResult` from decoding all of it,
`Subtitles` from its tracks and the files beside it."""

from dataclasses import dataclass, field
from typing import Any

from evoprune.errors import UsageError

# What an input is to the model.
VIDEO, PICTURE = "video", "picture"
# Default frame rate of a folder of images: the rate at which frames for Qwen2.5-VL are usually extracted.
FOLDER_FPS = 2.0
# What the comment of a clip says: which generator made it.
DEMO_TAG = "evoprune demo clip"
SCENES_TAG = "evoprune scenes clip"
_WORLDS = {DEMO_TAG: "shapes", SCENES_TAG: "scenes"}
# What else than a file subtitles can be asked from: nowhere, or wherever there are any.
NO_SUBTITLES, AUTO_SUBTITLES = "none", "auto"

SubtitleLine = tuple[float, float, str]  # start and end in seconds from the first frame, and what is said


@dataclass(frozen=True)
class Video:
    """Metadata of a video file, of a folder of images that is read as a video, or of a picture, which has no times.

    None is what the file does not state, or only a scan can tell.

    Attributes:
        duration_s: seconds from the first frame to the end of the last one.
        width, height: pixels as displayed, after rotation. Non-square pixels are not corrected.
        rotation_deg: clockwise rotation that turns stored frames into displayed ones: 0, 90, 180 or 270.
        codec, pix_fmt: such as `h264`, `yuv420p`; of a folder those of its first image.
        container: FFmpeg's name of the format, such as `matroska,webm`; `folder` for a folder, `picture` for a picture.
        fps: average frames per second. variable_rate: whether the frame intervals differ.
        start_s: the file's own timestamp of the first frame. All other times in this package count from there.
        tags: metadata tags of the container; of a picture its comment, if it has one.
        mirrored: stored frames are flipped left to right before they are rotated.
        stated_s: as `duration_s`, as the file states it for pictures alone; it is longer if the file was cut off.
    """

    path: str
    duration_s: float | None
    width: int
    height: int
    rotation_deg: int
    codec: str
    pix_fmt: str | None
    container: str
    fps: float | None = None
    variable_rate: bool | None = None
    frames_total: int | None = None
    start_s: float = 0.0
    tags: dict[str, str] = field(default_factory=dict)
    mirrored: bool = False
    stated_s: float | None = None

    @property
    def kind(self) -> str:
        return PICTURE if self.container == PICTURE else VIDEO

    @property
    def cut_short(self) -> bool:
        """Whether the end of the video is missing. Differences up to 0.5 s or 2% come from ways of counting."""
        if self.stated_s is None or self.duration_s is None:
            return False
        return self.stated_s - self.duration_s > max(0.5, 0.02 * self.stated_s)


def world_of(info: Video) -> str | None:
    """The name of the world that a file is of, by its generator's tag; None for a file that no generator made."""
    comments = (text for key, text in info.tags.items() if key.lower() == "comment")
    return next((_WORLDS[text] for text in comments if text in _WORLDS), None)


@dataclass(frozen=True)
class ScanResult:
    """What decoding a video from beginning to end found; `duration_s` and `stated_s` as in `Video`.

    Attributes:
        damaged: damaged packets (of a folder: images) that were skipped or patched up. Containers that hide their
            damage, such as Matroska, reveal it only by a `duration_s` below `stated_s`.
        variable_rate: whether more frame intervals are irregular than damage explains.
        largest_gap_s: longest time from one frame to the next; 0 for a single frame.
        keyframe_median_s, keyframe_max_s: time from a keyframe to the next one, or from the last one to the end.
    """

    frames: int
    damaged: int
    duration_s: float
    stated_s: float | None
    variable_rate: bool
    largest_gap_s: float
    keyframe_median_s: float
    keyframe_max_s: float
    seconds: float


@dataclass(frozen=True)
class Subtitles:
    """Subtitles of a video: `lines` by start, each without markup and line breaks.

    Attributes:
        source: the file, or the track in the video; None if there are none, and then `note` says why.
        warnings: "subtitles_encoding" if the file's encoding is a guess, cp1252; "damaged_subtitles" if there may be more lines.
    """

    source: str | None = None
    lines: list[SubtitleLine] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    note: str | None = None


@dataclass(frozen=True)
class PromptSubtitles:
    """What the prompt has of a video's `Subtitles`: `text` in front of the question, empty without any, of so many `tokens`.

    `lines` counts those of the part that is looked at, `lines_in_prompt` those in `text`.
    """

    text: str = ""
    source: str | None = None
    lines: int = 0
    lines_in_prompt: int = 0
    tokens: int = 0
    warnings: tuple[str, ...] = ()
    note: str | None = None

    def record(self) -> dict[str, Any] | None:
        names = ("source", "lines", "lines_in_prompt", "tokens")
        return {name: getattr(self, name) for name in names} if self.source is not None else None


NOTHING_SAID = PromptSubtitles()


def check_one_file(choice: str, inputs: int) -> None:
    """Raises UsageError where one file of subtitles is given for several inputs."""
    if inputs > 1 and choice not in (NO_SUBTITLES, AUTO_SUBTITLES):
        hint = "auto takes those beside each video, or in it"
        raise UsageError(f"{choice} holds the subtitles of one video, and there are {inputs} inputs", hint)


def check_picture(info: Video, choice: str) -> None:
    """Raises UsageError where a file of subtitles is given for a picture."""
    if info.kind == PICTURE and choice not in (NO_SUBTITLES, AUTO_SUBTITLES):
        raise UsageError(f"{info.path} is a picture, which has no subtitles", "leave them out, or give the video")
