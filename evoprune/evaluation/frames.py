"""Frames for an evaluation: those of a video, read once for all variants, and grey ones for the blind row."""

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np

from evoprune.video.frames import FrameChunk, read_frames
from evoprune.video.info import Video


class SharedFrames:
    """The frames of one video, read once for all variants that look at the same times."""

    def __init__(self):
        self._held: dict[tuple, list[FrameChunk]] = {}

    def read(self, info: Video, times_s: Sequence[float], **how) -> Iterator[FrameChunk]:
        """As `read_frames`. Frames that come in several chunks are too large to hold, and are read again each time."""
        key = (tuple(times_s), *sorted(how.items()))
        if key in self._held:
            yield from self._held[key]
            return
        chunks = []
        with closing(read_frames(info, times_s, **how)) as read:
            for chunk in read:
                chunks = [*chunks, chunk][:2]
                yield chunk
        if len(chunks) == 1:
            self._held[key] = chunks


def grey_frames(info: Video, times_s: Sequence[float], *, decoder: str, chunk_bytes: int) -> Iterator[FrameChunk]:
    """As `read_frames`, but every frame is grey: the size and the length of a video without its content."""
    at_once = max(2, chunk_bytes // (info.width * info.height * 3) // 2 * 2)
    for first in range(0, len(times_s), at_once):
        times = tuple(times_s[first : first + at_once])
        yield FrameChunk(first, np.full((len(times), info.height, info.width, 3), 128, np.uint8), times)
