"""The frames at given times: full-size RGB, in chunks of bounded size. Work grows with what is asked for, not with the file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from evoprune.errors import UsageError
from evoprune.keywords import brief, check_type
from evoprune.video.info import PICTURE, Video
from evoprune.video.sandbox.isolation import run_task, stream_frames

DECODERS = ("auto", "pyav", "decord")
PILLOW = "pillow"  # reads pictures, whatever is asked for


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive frames of a plan."""

    first: int  # index among the plan's times
    frames: np.ndarray  # uint8 `[n, H, W, 3]`, RGB as displayed (rotation applied), C-contiguous
    times_s: tuple[float, ...]  # of the frames themselves, from the first frame; perhaps earlier than those asked for
    damaged: int = 0  # damaged packets (of a folder: images) on the way to these frames that no earlier chunk counts


def read_frames(
    info: Video, times_s: Sequence[float], *, decoder: str = "auto", chunk_bytes: int = 64 * 2**20
) -> Iterator[FrameChunk]:
    """The frame on screen at each time: the first frame before the video begins, the last one after it ends.

    All frames have the size in `info`; where a video changes its size, they are scaled to it. Damaged packets are
    skipped: the frame before them stays on screen. (decord does not report damage: it stops, or patches up silently.)
    Close the iterator to stop early.

    Args:
        times_s: seconds from the video's first frame, ascending; a time may repeat.
        chunk_bytes: upper limit of a chunk's size, but a chunk holds two frames even if they are larger. Every chunk but the last
            holds an even number of frames, so that no frame pair is split.

    Raises:
        UsageError: times that do not ascend. And what `choose_decoder` raises.
        VideoError: while iterating: the file cannot be read (any more), or no frame can be decoded; see also `isolation.run_task`.
    """
    times = tuple(float(t) for t in times_s)
    if not all(map(math.isfinite, times)) or any(b < a for a, b in pairwise(times)):
        raise UsageError("times of frames must be numbers that ascend")
    decoder = choose_decoder(decoder, info)
    per_chunk = max(2, chunk_bytes // (info.width * info.height * 3) // 2 * 2)
    firsts = range(0, len(times), per_chunk)
    sizes = [min(per_chunk, len(times) - first) for first in firsts]
    filled = stream_frames(info, times, decoder, sizes) if sizes else ()
    return (FrameChunk(first, frames, tuple(at), bad) for first, (frames, at, bad) in zip(firsts, filled, strict=True))


def choose_decoder(decoder: str, info: Video | None = None) -> str:
    """The decoder to use, `pyav` or `decord`, and for a picture `pillow`, after a check that it can be used.

    `auto` is PyAV: decord decodes every frame (readers/decord.py says why), has no AV1, and gives up on damage.
    `python -m experiments.decoders` measures both.

    Raises UsageError: no such decoder, or it is not installed. VideoError: decord is known to fail on videos like this one.
    """
    if info is not None and info.kind == PICTURE:
        return PILLOW
    if decoder not in DECODERS:
        raise UsageError(f"unknown decoder {decoder!r}", f"choose one of {', '.join(DECODERS)}")
    if decoder != "decord":
        return "pyav"
    run_task("check_decord", info.path if info else "", {"info": asdict(info) if info else None})
    return "decord"


def check_frame(frame: np.ndarray, time_s: float) -> None:
    """Raises UsageError where a frame or its time is none."""
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise UsageError(f"a frame is {brief(frame)}, not uint8 [H, W, 3]", "give RGB pixels as a numpy array")
    check_type("time_s", time_s, float)
    if not math.isfinite(time_s):
        raise UsageError(f"the time of a frame is {time_s}", "give seconds")
