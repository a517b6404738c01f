"""The facts about a video that everything else starts from."""

import os

from evoprune.video.info import FOLDER_FPS, VideoInfo
from evoprune.video.sandbox.isolation import call

__all__ = ["VideoInfo", "probe"]


def probe(path: str | os.PathLike[str], *, folder_fps: float = FOLDER_FPS) -> VideoInfo:
    """Read the facts about a video file, or about a folder of images, which are then its frames.

    Decodes the first frame and reads the packets of the last seconds; a file that cannot be entered near its end is
    read through once, without decoding.

    Args:
        path: the file or folder. It is never taken for a URL or a pattern, and a playlist is not followed.
        folder_fps: how many images of a folder make a second.

    Raises:
        UsageError: `folder_fps` is not above 0.
        VideoError: no such file, not a video, no video stream, or one of which nothing can be decoded; a folder
            without images; see also `isolation.call`.
    """
    path = os.fspath(path)
    return VideoInfo(**call("probe", path, {"path": path, "folder_fps": folder_fps}))
