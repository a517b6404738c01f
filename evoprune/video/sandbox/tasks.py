"""Everything that is done with FFmpeg and Pillow, by name: in the worker process, or in this one where that is not possible."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from evoprune.video.info import PICTURE, Video
from evoprune.video.readers import decord, ffmpeg, folder, metadata, pyav, subtitles


def check_decord(info: dict[str, Any] | None) -> None:
    """Raises UsageError if decord cannot be loaded, VideoError if it cannot read this video."""
    decord.load()
    if info is not None:
        decord.check(Video(**info))


TASKS = {"probe": metadata.probe, "scan": metadata.scan, "check_decord": check_decord, "subtitles": subtitles.read}


def run(task: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a task as plain data."""
    result = TASKS[task](**arguments)
    return result and asdict(result)


class FrameReader:
    """The frames on screen at given times, in order; arguments as of `isolation.stream_frames`."""

    def __init__(self, info: Video, times_s: Sequence[float], decoder: str):
        ffmpeg.picture_size(info.width * info.height)
        if info.kind == PICTURE:
            from evoprune.video.readers import picture as reader  # Pillow's import would delay every video
        else:
            reader = decord if decoder == "decord" else folder if info.container == folder.CONTAINER else pyav
        self._damaged: set[int | None] = set()
        self._joints = info.clock_restarts  # at each of which a packet may be incomplete
        self._frames = reader.read(info, times_s, self._damaged.add)

    def fill(self, frames: np.ndarray) -> tuple[list[float], int]:
        """Write the next frames into uint8 `[n, H, W, 3]`.

        Returns the time of each frame in seconds, and how many damaged packets were found that earlier calls did not find.
        """
        times, before = [], self._count()
        for slot in frames:
            time, slot[:] = next(self._frames)
            times.append(time)
            ffmpeg.alive()
        return times, self._count() - before

    def _count(self) -> int:
        return max(0, len(self._damaged) - self._joints)

    def close(self) -> None:
        self._frames.close()
