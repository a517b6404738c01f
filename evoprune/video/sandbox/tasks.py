"""Everything that is done with FFmpeg and Pillow, by name.

It runs in the worker process, or in this one where `isolation` is not possible.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evoprune.video.info import PICTURE, VideoInfo
from evoprune.video.readers import decord, folder, heartbeat, metadata, pyav, scan, subtitles


def check_decord(info: dict[str, Any] | None) -> None:
    """Raises UsageError if decord cannot be loaded, VideoError if it cannot read this video."""
    decord.load()
    if info is not None:
        decord.check(VideoInfo(**info))


# Each returns a dataclass or None.
TASKS = {"probe": metadata.probe, "scan": scan.scan, "check_decord": check_decord, "subtitles": subtitles.read}


def _reader(info: VideoInfo, decoder: str):
    """The module that reads such a file."""
    if info.kind == PICTURE:
        from evoprune.video.readers import picture  # Pillow's import would delay every video

        return picture
    return decord if decoder == "decord" else folder if info.container == folder.CONTAINER else pyav


class FrameReader:
    """The frames on screen at given times, in order; see `frames.read_frames`.

    Args:
        info: the video.
        times_s: seconds from the first frame, ascending.
        decoder: as of `frames.choose_decoder`.
    """

    def __init__(self, info: VideoInfo, times_s: Sequence[float], decoder: str):
        reader = _reader(info, decoder)
        heartbeat.picture_size(info.width * info.height)
        self._damaged: set[int | None] = set()
        self._frames: Iterator[tuple[float, np.ndarray]] = reader.read(info, times_s, self._damaged.add)

    def fill(self, frames: np.ndarray) -> tuple[list[float], int]:
        """Write the next frames into uint8 `[n, H, W, 3]`.

        Returns:
            The time of each frame in seconds, and how many damaged packets were found that earlier calls did not find.
        """
        times, before = [], len(self._damaged)
        for slot in frames:
            time, rgb = next(self._frames)
            slot[:] = rgb
            times.append(time)
            heartbeat.alive()
        return times, len(self._damaged) - before

    def close(self) -> None:
        """Close the file."""
        self._frames.close()
