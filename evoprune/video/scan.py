"""What only reading a whole video tells: damage, its true length, how regular its frames and keyframes are."""

import os

from evoprune.video.info import FOLDER_FPS, ScanResult
from evoprune.video.sandbox.isolation import call

__all__ = ["ScanResult", "scan"]


def scan(path: str | os.PathLike[str], *, folder_fps: float = FOLDER_FPS) -> ScanResult:
    """Decode a whole video once. Holds a few frames at a time, and a count of intervals, however long the video is.

    Args:
        path: a file, or a folder of images.
        folder_fps: how many images of a folder make a second.

    Raises:
        UsageError: `folder_fps` is not above 0.
        VideoError: not a video, or nothing in it can be decoded; see also `isolation.call`.
    """
    path = os.fspath(path)
    return ScanResult(**call("scan", path, {"path": path, "folder_fps": folder_fps}))
