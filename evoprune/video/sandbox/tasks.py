"""Everything that is done with FFmpeg, by name: in the process of `worker`, or in this one where `isolation` is not possible."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evoprune.video import heartbeat
from evoprune.video.info import VideoInfo
from evoprune.video.readers import decord, facts, folder, pyav, survey


def check_decord(info: dict[str, Any] | None) -> None:
    """Raises UsageError where decord cannot be loaded, VideoError where it cannot read this video."""
    decord.load()
    if info is not None:
        decord.check(VideoInfo(**info))


# Each returns a dataclass or nothing; what it raises is said there.
TASKS = {"probe": facts.probe, "scan": survey.scan, "check_decord": check_decord}


class Pictures:
    """The pictures on screen at some moments, one after the other; see `decode.read_frames`.

    Args:
        info: the video.
        times_s: the moments, ascending.
        decoder: `pyav` or `decord`.
    """

    def __init__(self, info: VideoInfo, times_s: Sequence[float], decoder: str):
        reader = decord if decoder == "decord" else folder if info.container == folder.CONTAINER else pyav
        heartbeat.pixels(info.width * info.height)
        self._damaged: set[int | None] = set()
        self._pictures: Iterator[tuple[float, np.ndarray]] = reader.read(info, times_s, self._damaged.add)

    def fill(self, frames: np.ndarray) -> tuple[list[float], int]:
        """Puts the next pictures into uint8 `[n, H, W, 3]`; since when each is shown in seconds, and how much damage is new."""
        times, before = [], len(self._damaged)
        for slot in frames:
            time, rgb = next(self._pictures)
            slot[:] = rgb
            times.append(time)
            heartbeat.alive()
        return times, len(self._damaged) - before

    def close(self) -> None:
        """Closes the file."""
        self._pictures.close()
