"""What is known about a video: the facts that everything else starts from, and what only reading all of it tells."""

from collections.abc import Callable
from dataclasses import dataclass

# Images of a folder per second, unless the caller says otherwise: the rate at which frames for Qwen2.5-VL are usually extracted.
FOLDER_FPS = 2.0
# What the comment of a clip says that the demo model's own generator made.
DEMO_TAG = "evoprune demo clip"

# Is told of what is damaged in a video: its number, by which it is known if it is met again; None where the file breaks off.
Damage = Callable[[int | None], None]


def ignored(what: int | None) -> None:
    """A `Damage` that nobody wants to know of."""


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video file, or about a folder of images that stands for one.

    Attributes:
        path: as it was given.
        duration_s: seconds from the first frame to the end of the last one; None if unknown.
        width, height: pixels as displayed, after rotation (the shape of a pixel is not taken into account).
        rotation_deg: how far stored frames are turned clockwise for display: 0, 90, 180 or 270.
        codec: such as `h264`; of a folder that of its first image, such as `png`.
        pix_fmt: such as `yuv420p`.
        container: FFmpeg's name of the format, such as `matroska,webm`; `folder` for a folder.
        fps: average frames per second; None if unknown.
        variable_rate: None if only a scan of the whole file could tell.
        frames_total: None if only a scan of the whole file could tell.
        start_s: the file's own time of the first frame; all other times in this package count from there.
        tags: the container's metadata.
        mirrored: stored frames are flipped left to right before they are turned.
        stated_s: seconds from the first frame to the end of the last one by the file's own word, which is more than `duration_s`
            where it was cut off; None where the file does not say, or says so of sound and pictures together.
    """

    path: str
    duration_s: float | None
    width: int
    height: int
    rotation_deg: int
    codec: str
    pix_fmt: str | None
    container: str
    fps: float | None
    variable_rate: bool | None
    frames_total: int | None
    start_s: float
    tags: dict[str, str]
    mirrored: bool = False
    stated_s: float | None = None

    @property
    def cut_short(self) -> bool:
        """Whether the end that the file states is missing: half a second, and 2%, are mere ways of counting."""
        if self.stated_s is None or self.duration_s is None:
            return False
        return self.stated_s - self.duration_s > max(0.5, 0.02 * self.stated_s)


def is_demo_clip(info: VideoInfo) -> bool:
    """Whether the demo model's own generator made this file: it tags its clips."""
    return any(key.lower() == "comment" and value == DEMO_TAG for key, value in info.tags.items())


@dataclass(frozen=True)
class ScanResult:
    """What decoding a video from beginning to end found.

    Attributes:
        frames: how many can be decoded.
        damaged: packets (of a folder: images) that are damaged, and were skipped or patched up. Containers that hide their
            damage, such as Matroska, show it only by a `duration_s` below `stated_s`.
        duration_s: seconds from the first frame to the end of the last one.
        stated_s: as in `VideoInfo`.
        variable_rate: whether more frame intervals are out of step than damage explains.
        largest_gap_s: longest time in seconds from one frame to the next; 0 for a single frame.
        keyframe_median_s, keyframe_max_s: seconds from a keyframe to the next one, from the last one to the end.
        seconds: how long the scan took.
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
