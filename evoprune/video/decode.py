"""From moments to frames: full-size RGB, in chunks of bounded size, with work in proportion to what is needed."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice, pairwise

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from evoprune.errors import UsageError, VideoError
from evoprune.video.probe import FALLBACK_FPS, VideoInfo, frame_time, open_video, reading, video_stream

# A frame counts as shown this much before its time: Matroska rounds times to milliseconds, half of one up or down.
TOLERANCE_S = 0.0006
# Jump to a moment this far ahead instead of decoding all frames in between. Keyframes are commonly 1 to 10 s apart; a
# jump lands on the one before the moment, so short jumps would decode the same frames again. Where keyframes turn out
# to lie further apart than this, only longer jumps are made.
SEEK_AHEAD_S = 4.0
# A jump may land behind the moment (MPEG-TS has no index); then try again from so many seconds earlier.
SEEK_BACK_S = (0.0, 4.0, 16.0)
# Containers that store when each frame is shown, so that times are the same after a jump; others are read through.
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")

Picture = tuple[float, np.ndarray]  # when it is shown, in seconds from the first frame; uint8 [H, W, 3] as displayed
TimedFrame = tuple[float, VideoFrame]  # the same before conversion: the decoder's own pixels, not yet turned


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive frames of a plan.

    Attributes:
        first: index of the first of them among the plan's times.
        frames: uint8 `[n, H, W, 3]`, RGB as displayed (rotation applied), C-contiguous.
        times_s: when each frame that is used is really shown, in seconds from the video's first frame.
    """

    first: int
    frames: np.ndarray
    times_s: tuple[float, ...]


def read_frames(
    info: VideoInfo,
    times_s: Sequence[float],
    *,
    decoder: str = "auto",
    chunk_bytes: int = 64 * 2**20,
    even: bool = True,
) -> Iterator[FrameChunk]:
    """The frame on screen at each moment: the first frame before the video begins, the last one after it ends.

    All frames have the size in `info`; where a video changes its size, they are scaled to it. Damaged packets are
    skipped: the frame before them stays on screen. Close the iterator to stop early.

    Args:
        info: the video, from `probe`.
        times_s: moments in seconds from the video's first frame, ascending; a moment may repeat.
        decoder: `auto` or `pyav`.
        chunk_bytes: upper limit of a chunk's size, but a chunk holds two frames even if they are larger.
        even: chunks hold an even number of frames (the last one the rest), so that no pair is torn apart.

    Raises:
        UsageError: unknown decoder, or times that do not ascend.
        VideoError: the file cannot be read (any more), or nothing in it can be decoded; raised while iterating.
    """
    times = tuple(float(t) for t in times_s)
    if decoder not in DECODERS:
        raise UsageError(f"unknown decoder {decoder!r}", f"choose one of {', '.join(DECODERS)}")
    if not all(map(math.isfinite, times)) or any(b < a for a, b in pairwise(times)):
        raise UsageError("times of frames must be finite and ascend")
    per_chunk = max(2, chunk_bytes // (info.width * info.height * 3))
    if even:
        per_chunk -= per_chunk % 2
    return _chunks(DECODERS[decoder](info, times), info, len(times), per_chunk)


def _chunks(pictures: Iterator[Picture], info: VideoInfo, total: int, per_chunk: int) -> Iterator[FrameChunk]:
    with closing(pictures):
        for first in range(0, total, per_chunk):
            yield _chunk(pictures, info, first, min(per_chunk, total - first))


def _chunk(pictures: Iterator[Picture], info: VideoInfo, first: int, count: int) -> FrameChunk:
    frames, times = np.empty((count, info.height, info.width, 3), np.uint8), []
    for slot, (time, rgb) in zip(frames, islice(pictures, count), strict=True):
        slot[:] = rgb
        times.append(time)
    return FrameChunk(first, frames, tuple(times))


def _read_with_pyav(info: VideoInfo, times: Sequence[float]) -> Iterator[Picture]:
    """The picture on screen at each moment; the same array again where the same frame is."""
    reformatter, converted, rgb = VideoReformatter(), None, None
    with reading(info.path), closing(_on_screen(info, times)) as shown:
        for time, frame in shown:
            if frame is not converted:
                converted, rgb = frame, _to_rgb(frame, info, reformatter)
            yield time, rgb


DECODERS: dict[str, Callable[[VideoInfo, Sequence[float]], Iterator[Picture]]] = {
    "auto": _read_with_pyav,
    "pyav": _read_with_pyav,
}


def _on_screen(info: VideoInfo, times: Sequence[float], *, seek: bool = True) -> Iterator[TimedFrame]:
    """The frame on screen at each moment; holds no more than that frame and the one after it."""
    end = info.duration_s if seek and info.container in SEEKABLE else None
    jump_from, keyframe_time = SEEK_AHEAD_S, 0.0
    with open_video(info.path) as container:
        stream = video_stream(container, info.path)
        stream.thread_type = "AUTO"
        frames = _decode(container, stream, info)
        shown, coming = None, next(frames, None)
        if coming is None:
            raise VideoError(f"no frame of {info.path} can be decoded", "the file is damaged or incomplete")
        for i, moment in enumerate(times):
            if end is not None and coming and min(moment, end) - coming[0] > jump_from:
                frames = _jump(container, stream, info, min(moment, end))
                if frames is None:
                    yield from _on_screen(info, times[i:], seek=False)
                    return
                shown, coming = None, next(frames)
            while coming and coming[0] <= moment + TOLERANCE_S:
                if coming[1].key_frame:
                    keyframe_time = coming[0]
                jump_from = max(jump_from, coming[0] - keyframe_time)
                shown, coming = coming, next(frames, None)
            yield shown or coming


def _jump(
    container: InputContainer, stream: VideoStream, info: VideoInfo, moment: float
) -> Iterator[TimedFrame] | None:
    """The frames from a keyframe at or before `moment` on; None if none could be reached."""
    for back in SEEK_BACK_S:
        try:
            container.seek(math.floor((moment - back + info.start_s) / stream.time_base), stream=stream)
        except av.error.FFmpegError:
            return None
        frames = _decode(container, stream, info)
        for time, frame in frames:
            if time > moment + TOLERANCE_S:
                break
            # Until the first true keyframe, frames may lack those that they were predicted from.
            if frame.key_frame and frame.pict_type == PictureType.I:
                return chain([(time, frame)], frames)
    return None


def _decode(container: InputContainer, stream: VideoStream, info: VideoInfo) -> Iterator[TimedFrame]:
    """All frames from where the container stands, in the order in which they are shown."""
    step = 1 / (info.fps or FALLBACK_FPS)
    time = -step
    for packet in _packets(container, stream):
        try:
            frames = stream.decode(packet)
        except av.error.FFmpegError:  # a damaged packet: the next may be whole
            continue
        for frame in frames:
            stamp = frame_time(frame, stream)
            time = time + step if stamp is None else stamp - info.start_s
            yield time, frame


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet | None]:
    """Packets up to the end; where the file breaks off, a last None makes the decoder hand out what it still holds."""
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        yield None


def _to_rgb(frame: VideoFrame, info: VideoInfo, reformatter: VideoReformatter) -> np.ndarray:
    """Pixels as displayed: uint8 `[H, W, 3]`, by libswscale's default conversion."""
    stored = (info.width, info.height) if info.rotation_deg % 180 == 0 else (info.height, info.width)
    rgb = reformatter.reformat(frame, *stored, format="rgb24").to_ndarray()
    if info.mirrored:
        rgb = rgb[:, ::-1]
    return np.rot90(rgb, -info.rotation_deg // 90)  # rot90 turns anticlockwise
