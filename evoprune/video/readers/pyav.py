"""Frames of a file by PyAV: it jumps over long gaps, continues after damage, and opens everything that FFmpeg opens."""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain

import av
from av.container import InputContainer
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from evoprune.video.info import Video
from evoprune.video.readers import ffmpeg
from evoprune.video.readers.pixels import to_rgb

# Jump over gaps longer than this, in seconds, instead of decoding all frames in between. Keyframes are commonly 1 to 10 s
# apart; a jump lands on the one before the wanted time, so short jumps would decode the same frames again. Where keyframes
# turn out to be further apart than this, only longer jumps are made.
MIN_JUMP_S = 4.0
# A jump may land after the wanted time (MPEG-TS has no index). Then these many seconds earlier are tried.
SEEK_BACK_S = (0.0, 4.0, 16.0)

TimedFrame = tuple[float, VideoFrame]  # seconds from the first frame; the decoder's own pixels, not yet rotated


def read(info: Video, times_s: Sequence[float], damaged: ffmpeg.Damage) -> ffmpeg.Frames:
    """As `readers` says. Holds two decoded frames at a time; `damaged` may be called more than once for the same damage."""
    reformatter, converted, rgb = VideoReformatter(), None, None
    with ffmpeg.reading(info.path), closing(_on_screen(info, times_s, damaged)) as on_screen:
        for time, frame in on_screen:
            if frame is not converted:
                converted = frame
                rgb = to_rgb(frame, info.width, info.height, info.rotation_deg, info.mirrored, reformatter)
            yield time, rgb


def intervals(info: Video, damaged: ffmpeg.Damage) -> Iterator[tuple[float, float, bool]]:
    """The time and duration of every frame in seconds, and whether it is a keyframe."""
    step = 1 / (info.fps or ffmpeg.FALLBACK_FPS)
    with ffmpeg.open_video(info.path) as container:
        stream = ffmpeg.video_stream(container, info.path, threads=True)
        for time_s, frame in decode(container, stream, info, damaged):
            length = frame.duration if frame.pts is not None else 0
            yield time_s, float((length or 0) * stream.time_base) or step, frame.key_frame


def _on_screen(
    info: Video, times: Sequence[float], damaged: ffmpeg.Damage, *, seek: bool = True
) -> Iterator[TimedFrame]:
    """The frame on screen at each time. Holds no more than that frame and the one after it."""
    seek = seek and info.container in ffmpeg.SEEKABLE and not info.clock_restarts
    end = info.duration_s if seek else None
    jump_from, keyframe_time = MIN_JUMP_S, 0.0
    with ffmpeg.open_video(info.path) as container:
        stream = ffmpeg.video_stream(container, info.path, threads=True)
        frames = decode(container, stream, info, damaged)
        current, coming = None, next(frames, None)
        if coming is None:
            raise ffmpeg.nothing_decoded(info.path)
        for i, wanted in enumerate(times):
            if end is not None and coming and min(wanted, end) - coming[0] > jump_from:
                frames = _jump(container, stream, info, min(wanted, end), damaged)
                if frames is None:
                    yield from _on_screen(info, times[i:], damaged, seek=False)
                    return
                current, coming = None, next(frames)
            while coming and coming[0] <= wanted + ffmpeg.TOLERANCE_S:
                if coming[1].key_frame:
                    keyframe_time = coming[0]
                jump_from = max(jump_from, coming[0] - keyframe_time)
                current, coming = coming, next(frames, None)
            yield current or coming


def _jump(
    container: InputContainer, stream: VideoStream, info: Video, wanted: float, damaged: ffmpeg.Damage
) -> Iterator[TimedFrame] | None:
    """The frames from a keyframe at or before the wanted time on; None if none could be reached."""
    for back in SEEK_BACK_S:
        try:
            container.seek(math.floor((wanted - back + info.start_s) / stream.time_base), stream=stream)
        except av.error.FFmpegError:
            return None
        # Frames that lack what they depend on, because decoding starts in the middle, are not damaged.
        landed = False
        frames = decode(container, stream, info, lambda number: landed and damaged(number))  # noqa: B023
        for time, frame in frames:
            if time > wanted + ffmpeg.TOLERANCE_S:
                break
            # Before the first true keyframe, frames may lack the frames that they were predicted from.
            if frame.key_frame and frame.pict_type == PictureType.I:
                landed = True
                return chain([(time, frame)], frames)
    return None


def decode(container: InputContainer, stream: VideoStream, info: Video, damaged: ffmpeg.Damage) -> Iterator[TimedFrame]:
    """As `decoded_frames`, with the time of each frame: where the file states none, one step after the frame before it.

    So is the first frame after a restart of the file's clock, from where on times are counted.
    """
    step = 1 / (info.fps or ffmpeg.FALLBACK_FPS)
    time, origin = -step, info.start_s
    for frame in ffmpeg.decoded_frames(container, stream, damaged):
        stamp = ffmpeg.frame_time(frame, stream)
        if stamp is not None and info.clock_restarts and ffmpeg.restarts(stamp - origin - time, info.container):
            origin = stamp - time - step
        time = time + step if stamp is None else stamp - origin
        yield time, frame
