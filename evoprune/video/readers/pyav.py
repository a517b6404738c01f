"""Frames of a file by PyAV: jumps over what nobody asked for, goes on after damage, and opens everything FFmpeg does."""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from evoprune.video import heartbeat
from evoprune.video.info import Damage, VideoInfo, ignored
from evoprune.video.readers.container import (
    FALLBACK_FPS,
    SEEKABLE,
    TOLERANCE_S,
    frame_time,
    nothing_decoded,
    open_video,
    packets,
    reading,
    video_stream,
)
from evoprune.video.readers.pixels import to_rgb

# Jump to a moment this far ahead instead of decoding all frames in between. Keyframes are commonly 1 to 10 s apart; a
# jump lands on the one before the moment, so short jumps would decode the same frames again. Where keyframes turn out
# to lie further apart than this, only longer jumps are made.
SEEK_AHEAD_S = 4.0
# A jump may land behind the moment (MPEG-TS has no index); then try again from so many seconds earlier.
SEEK_BACK_S = (0.0, 4.0, 16.0)

TimedFrame = tuple[float, VideoFrame]  # seconds from the first frame; the decoder's own pixels, not yet turned


def read(info: VideoInfo, times_s: Sequence[float], damaged: Damage = ignored) -> Iterator[tuple[float, np.ndarray]]:
    """The picture on screen at each moment, and since when: seconds from the first frame, uint8 `[H, W, 3]` as displayed.

    The same array comes again where the same frame is shown. Holds two decoded frames at a time. `times_s` ascend.
    `damaged` is told what was skipped or patched up on the way, perhaps more than once.

    Raises:
        VideoError: the file cannot be read (any more), or nothing in it can be decoded.
    """
    reformatter, converted, rgb = VideoReformatter(), None, None
    with reading(info.path), closing(_on_screen(info, times_s, damaged)) as shown:
        for time, frame in shown:
            if frame is not converted:
                converted = frame
                rgb = to_rgb(frame, info.width, info.height, info.rotation_deg, info.mirrored, reformatter)
            yield time, rgb


def _on_screen(info: VideoInfo, times: Sequence[float], damaged: Damage, *, seek: bool = True) -> Iterator[TimedFrame]:
    """The frame on screen at each moment; holds no more than that frame and the one after it."""
    end = info.duration_s if seek and info.container in SEEKABLE else None
    jump_from, keyframe_time = SEEK_AHEAD_S, 0.0
    with open_video(info.path) as container:
        stream = video_stream(container, info.path)
        stream.thread_type = "AUTO"
        frames = decode(container, stream, info, damaged)
        shown, coming = None, next(frames, None)
        if coming is None:
            raise nothing_decoded(info.path)
        for i, moment in enumerate(times):
            if end is not None and coming and min(moment, end) - coming[0] > jump_from:
                frames = _jump(container, stream, info, min(moment, end), damaged)
                if frames is None:
                    yield from _on_screen(info, times[i:], damaged, seek=False)
                    return
                shown, coming = None, next(frames)
            while coming and coming[0] <= moment + TOLERANCE_S:
                if coming[1].key_frame:
                    keyframe_time = coming[0]
                jump_from = max(jump_from, coming[0] - keyframe_time)
                shown, coming = coming, next(frames, None)
            yield shown or coming


def _jump(
    container: InputContainer, stream: VideoStream, info: VideoInfo, moment: float, damaged: Damage
) -> Iterator[TimedFrame] | None:
    """The frames from a keyframe at or before `moment` on; None if none could be reached."""
    for back in SEEK_BACK_S:
        try:
            container.seek(math.floor((moment - back + info.start_s) / stream.time_base), stream=stream)
        except av.error.FFmpegError:
            return None
        # What lacks its beginning, because it is entered in the middle, is not damaged.
        landed = False
        frames = decode(container, stream, info, lambda what: landed and damaged(what))  # noqa: B023
        for time, frame in frames:
            if time > moment + TOLERANCE_S:
                break
            # Until the first true keyframe, frames may lack those that they were predicted from.
            if frame.key_frame and frame.pict_type == PictureType.I:
                landed = True
                return chain([(time, frame)], frames)
    return None


def decode(container: InputContainer, stream: VideoStream, info: VideoInfo, damaged: Damage) -> Iterator[TimedFrame]:
    """All frames from where the container stands, in the order in which they are shown.

    Damaged packets are skipped, frames that the decoder patched up are not; `damaged` is told of both, and of an end that is none.
    """
    step = 1 / (info.fps or FALLBACK_FPS)
    time = -step
    for packet in packets(container, stream, damaged):
        broken, frames = packet is None or packet.is_corrupt, []
        try:
            frames = stream.decode(packet)
        except av.error.FFmpegError:  # the next may be whole
            broken = True
        if broken:
            damaged(None if packet is None else packet.dts if packet.pts is None else packet.pts)
        for frame in frames:
            heartbeat.alive()
            if frame.is_corrupt:
                damaged(frame.dts if frame.pts is None else frame.pts)
            stamp = frame_time(frame, stream)
            time = time + step if stamp is None else stamp - info.start_s
            yield time, frame
