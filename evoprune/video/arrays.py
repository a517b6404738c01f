"""Reads frames into a single NumPy array without importing torch, for programs that only need evoprune's video reader."""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import numpy as np
from numpy.typing import NDArray

from evoprune.backend import Host
from evoprune.errors import OutOfMemory, UsageError, memory_guard
from evoprune.signatures import takes
from evoprune.util import brief, counted, from_keywords, size
from evoprune.video.frames import checked_times, probe, read_chunks
from evoprune.video.info import MAX_TIMES, Video
from evoprune.video.plan import SamplingOptions, SamplingPlan

if TYPE_CHECKING:
    from evoprune.keywords import ReadKeywords


@takes(SamplingOptions, names=SamplingOptions.READING, seek="exact")
def read_frames(
    path: str | os.PathLike[str],
    times_s: Iterable[float] | None = None,
    **options: "Unpack[ReadKeywords]",
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Read frames from a video file, a folder of images, or a still image. On Linux, decoding runs in a separate process.

        frames, times_s = evoprune.read_frames("clip.mp4", [0.5, 3.0, 9.25])
        frames, times_s = evoprune.read_frames("clip.mp4", frames=64)

    For each requested time, the result contains the frame on screen at that moment. Times before the start of the video yield the
    first frame, and times after its end yield the last frame.

    Args:
        times_s: Up to 2,097,152 timestamps in seconds from the first frame, in ascending order. Duplicates are allowed.
        options: How to read frames: the fields of `keywords.ReadKeywords`. `frames` or `fps` is an alternative to `times_s`. The
            span from `start_s` to `end_s` is divided into equal parts, and the frame in the middle of each part is read. The result
            contains exactly `frames` frames (also if the number is odd) or at least one, and one for a still image.

    Returns:
        The frames as uint8 `[n, H, W, 3]`, RGB with the video's rotation applied, and their actual timestamps in seconds as float64
        `[n]`. An actual timestamp is equal to the requested time or slightly earlier. With "keyframes" or "auto", it may differ
        from the requested time by up to half the length of a part in either direction.

    Raises:
        UsageError: The arguments are invalid or conflict with each other, or decord is requested but not installed.
        VideoError: The file is missing, cannot be read, is not a video, or has no frames in the span; or the decoder process
            crashed or hung.
        OutOfMemory: The frames do not fit in memory.
    """
    _check_path(path)
    (sampling,) = from_keywords({"seek": "exact", **options}, SamplingOptions)
    if times_s is None and not sampling.sets_frames:
        raise UsageError("neither times nor frames nor fps is given", "give one of them")
    if times_s is not None and sampling != replace(
        SamplingOptions(seek="exact"), frame_rate=sampling.frame_rate, decoder=sampling.decoder
    ):
        raise UsageError(
            "times cannot be combined with frames, fps, start_s, end_s or seek",
            "give only the times, or leave them out",
        )
    times = None if times_s is None else _as_numbers(times_s)
    info = probe(path, folder_fps=sampling.frame_rate)
    part_s = 0.0
    if times is None:
        times, part_s = _parts(info, sampling)
    return in_one(info, times, decoder=sampling.decoder, seek=sampling.seek, part_s=part_s)


def in_one(info: Video, times_s: Sequence[float], **how) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Read frames using `video.frames.read_chunks` and copy them into a single array. For the result and errors, see `read_frames`.

    Args:
        how: Additional keyword arguments to pass to `read_chunks`.
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
    """Raise OutOfMemory if `count` full-size video frames do not fit in the available memory."""
    needed = 3 * count * info.height * info.width
    available = Host().available_memory()
    if available is not None and needed > available:
        figures = f"{counted(count, 'frame')} of {info.width}x{info.height} take {size(needed)}"
        hint = "read fewer at a time, for example with start_s and end_s"
        raise OutOfMemory(f"{figures}, but only {size(available)} are available", hint, stage="read")


def _check_path(path: object) -> None:
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise UsageError(f"the input is {brief(path)}, not a path", "give the path of a file or a folder of frames")


def _as_numbers(times_s: Iterable[float]) -> tuple[float, ...]:
    try:
        return checked_times(times_s)
    except (TypeError, ValueError, OverflowError):
        message = f"times_s is {brief(times_s)}, not numbers"
        hint = "give a list of times in seconds from the first frame"
        if isinstance(times_s, int):
            hint += f", or frames={times_s} for that number of frames"
        raise UsageError(message, hint) from None


def _parts(info: Video, sampling: SamplingOptions) -> tuple[tuple[float, ...], float]:
    """Divide the sampled span into equal parts. Returns the midpoints and the length of the parts, both in seconds."""
    if info.is_picture:
        sampling.check_still(info)
        return (0.0,), 0.0
    start, end = sampling.span(info.length_s)
    count = sampling.frames or max(1, math.floor(min((end - start) * sampling.fps, sys.maxsize) + 0.5))
    check_room(info, count)  # before the plan is made, because even the list of times may not fit in memory
    if count > MAX_TIMES:
        hint = "read fewer at a time, for example with start_s and end_s"
        raise UsageError(f"{count:,} frames are requested at once, but {MAX_TIMES:,} is the maximum", hint)
    plan = SamplingPlan.even(start, end, count)
    return plan.times_s, plan.seconds_per_frame
