"""Frames in one array, for a model or a program of any kind: `evoprune.read_frames`. No torch here."""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from evoprune.backend import host_memory
from evoprune.errors import OutOfMemory, UsageError, memory_guard
from evoprune.util import brief, counted, size
from evoprune.video.frames import probe, read_chunks
from evoprune.video.info import EXACT, FOLDER_FPS, PICTURE, Decoder, Seek, Video
from evoprune.video.plan import SamplingOptions, check_no_span, duration_of, even_times, span_of


def read_frames(
    path: str | os.PathLike[str],
    times_s: Iterable[float] | None = None,
    *,
    frames: int | None = None,
    fps: float | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    seek: Seek = "exact",
    decoder: Decoder = "auto",
    frame_rate: float = FOLDER_FPS,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Read frames of a video file, of a folder of images or of a picture; on Linux in a process apart.

        frames, times_s = evoprune.read_frames("clip.mp4", [0.5, 3.0, 9.25])
        frames, times_s = evoprune.read_frames("clip.mp4", frames=64)

    A time gets the frame that is on screen then: the first one before the video begins, the last one after it ends.

    Args:
        times_s: seconds from the first frame, ascending; a time may repeat.
        frames, fps: instead of times, the number of frames, or frames a second (at least one frame). The video is divided into so
            many equal parts, and the frames are those on screen in their middles. Of a picture one frame is read.
        start_s, end_s: the span that is divided, in seconds; below 0 from the end.
        seek: of parts: "exact", "keyframes" or "auto", as `--seek` in docs/video.md.
        decoder: "auto", "pyav" or "decord".
        frame_rate: images of a folder per second of video.

    Returns the frames, uint8 `[n, H, W, 3]`, RGB as displayed (rotation applied), and the times of the frames themselves, float64
    `[n]`, in seconds: those asked for or a little earlier; with `seek`, at most half a part before or after.

    Raises:
        UsageError: arguments that make no sense, alone or together; or decord is not installed.
        VideoError: the file is missing, unreadable, not a video, or empty in the span; or its process crashed or hung.
        OutOfMemory: there is no memory for so many frames of that size.
    """
    _check_path(path)
    sampling = SamplingOptions(fps=fps, frames=frames, start_s=start_s, end_s=end_s, frame_rate=frame_rate, seek=seek)
    if times_s is None and not sampling.sets_frames:
        raise UsageError("neither times nor frames nor fps is given", "give one of them")
    if times_s is not None and sampling != SamplingOptions(frame_rate=frame_rate, seek=EXACT):
        raise UsageError("times exclude frames, fps, start_s, end_s and seek", "leave out the times, or the others")
    times = None if times_s is None else _as_numbers(times_s)
    info = probe(path, folder_fps=frame_rate)
    part_s = 0.0
    if times is None:
        times, part_s = _parts(info, sampling)
    return in_one(info, times, decoder=decoder, seek=seek, part_s=part_s)


def in_one(info: Video, times_s: Sequence[float], **how) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return what `read_frames` returns, for the times of `video.frames.read_chunks`, whose options `how` has.

    Raises as `read_frames`.
    """
    check_room(info, len(times_s))
    with memory_guard("read"):
        frames = np.empty((len(times_s), info.height, info.width, 3), np.uint8)
        found_s = np.empty(len(times_s), np.float64)
        with closing(read_chunks(info, times_s, **how)) as chunks:
            for chunk in chunks:
                place = slice(chunk.first, chunk.end)
                frames[place] = chunk.pixels
                found_s[place] = chunk.times_s
    return frames, found_s


def check_room(info: Video, count: int) -> None:
    """Raises OutOfMemory: so many frames do not fit into memory."""
    needed = 3 * count * info.height * info.width
    available = host_memory()
    if available is not None and needed > available:
        figures = f"{counted(count, 'frame')} of {info.width}x{info.height} take {size(needed)}"
        hint = "read fewer at a time, for example by start_s and end_s"
        raise OutOfMemory(f"{figures}, and {size(available)} are available", hint, stage="read")


def _check_path(path: object) -> None:
    """Raises UsageError."""
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise UsageError(f"the input is {brief(path)}, not a path", "give the path of a file or a folder of frames")


def _as_numbers(times_s: Iterable[float]) -> tuple[float, ...]:
    """Raises UsageError."""
    try:
        return tuple(float(time) for time in times_s)
    except (TypeError, ValueError, OverflowError):
        message = f"times_s is {brief(times_s)}, not numbers"
        raise UsageError(message, "give a list of seconds from the first frame") from None


def _parts(info: Video, sampling: SamplingOptions) -> tuple[tuple[float, ...], float]:
    """Return the middles of equal parts, and the length of a part, in seconds. Raises as `read_frames`."""
    if info.kind == PICTURE:
        check_no_span(info, sampling.start_s, sampling.end_s)
        return (0.0,), 0.0
    start, end = span_of(duration_of(info), sampling.start_s, sampling.end_s)
    count = sampling.frames or max(1, math.floor(min((end - start) * sampling.fps, sys.maxsize) + 0.5))
    check_room(info, count)  # before their times are listed, which may be too many as well
    return even_times(start, end, count), (end - start) / count
