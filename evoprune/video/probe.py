"""What is in a video: `probe` reads its metadata, `scan` decodes all of it, `read_subtitles` reads what is said in it."""

import os
from typing import Any

from evoprune.video.info import FOLDER_FPS, ScanResult, Subtitles, Video
from evoprune.video.sandbox.isolation import run_task


def probe(path: str | os.PathLike[str], *, folder_fps: float = FOLDER_FPS) -> Video:
    """Read the metadata of a video file, or of a folder of images, which then become its frames.

    Decodes the first frame and reads the packets of the last seconds. If the file cannot be entered near its end, all its
    packets are read once, without decoding.

    Args:
        path: is never taken for a URL or a pattern, and playlists are not followed.
        folder_fps: images of a folder per second of video.

    Raises:
        UsageError: `folder_fps` is not above 0.
        VideoError: no such file, not a video, no video stream, no frame that can be decoded, or a folder without images;
            see also `isolation.run_task`.
    """
    return Video(**_run("probe", path, folder_fps=folder_fps))


def scan(path: str | os.PathLike[str], *, folder_fps: float = FOLDER_FPS) -> ScanResult:
    """Decode a whole video once, to find damage, its true length, and how regular its frames and keyframes are.

    Memory does not grow with the video: a few frames at a time, and a count of each frame interval. Otherwise as `probe`.
    """
    return ScanResult(**_run("scan", path, folder_fps=folder_fps))


def read_subtitles(info: Video, choice: str, start_s: float = 0.0, end_s: float = 1e9) -> Subtitles:
    """The subtitles whose time overlaps a part of a video, in seconds from the first frame.

    Args:
        choice: a file of subtitles (SRT, WebVTT, ASS, SSA), or a video with a text track; or "auto": a file beside the video, else
            the video's default text track or its only one, else none.

    Raises VideoError: no such file; or no subtitles in it, pictures of text only, or text of an unknown encoding; see also
    `isolation.run_task`.
    """
    found = _run("subtitles", info.path, origin_s=info.start_s, choice=choice, start_s=start_s, end_s=end_s)
    return Subtitles(**found | {"lines": [tuple(line) for line in found["lines"]]})


def _run(task: str, path: str | os.PathLike[str], **arguments) -> dict[str, Any]:
    return run_task(task, os.fspath(path), {"path": os.fspath(path), **arguments})
