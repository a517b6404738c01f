"""The facts about a video that everything else starts from."""

from dataclasses import dataclass


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
