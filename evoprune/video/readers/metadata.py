"""Metadata of a video file, read without decoding more than its first frame."""

import math
import os
from collections.abc import Iterable, Iterator

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from evoprune.errors import VideoError
from evoprune.video.info import Video
from evoprune.video.readers import ffmpeg, folder
from evoprune.video.readers.pixels import orientation, turned_size
from evoprune.video.readers.signatures import PICTURES, picture_format

# The video's end is read from the packets of its last seconds: the frame displayed last is not always the one stored last.
TAIL_S = 3.0
# Frame intervals that differ by less are constant: Matroska rounds times to milliseconds.
RATE_JITTER_S = 0.0025


def probe(path: str, folder_fps: float) -> Video:
    """See `evoprune.video.probe.probe`."""
    with ffmpeg.reading(path):
        if os.path.isdir(path):
            return folder.probe(path, folder_fps)
        if picture_format(path):
            from evoprune.video.readers import picture  # Pillow's import would delay every video

            if picture.is_picture(path):
                return picture.probe(path)
        with ffmpeg.open_video(path) as container:
            return _probe_file(path, container)


def _probe_file(path: str, container: InputContainer) -> Video:
    stream = ffmpeg.video_stream(container, path)
    if container.format.name.endswith("_pipe"):  # FFmpeg's names for single pictures: jpegxl_pipe and so on
        hint = f"convert it to JPEG or PNG; {', '.join(PICTURES)} are read"
        raise VideoError(f"{path} is a picture of a kind that is not read ({stream.codec_context.codec.name})", hint)
    first = next(ffmpeg.decoded_frames(container, stream), None)
    if first is None:
        raise ffmpeg.nothing_decoded(path)
    rotation, mirrored = orientation(first)
    width, height = turned_size((first.width, first.height), rotation)
    rate = stream.average_rate or stream.guessed_rate
    step = 1 / float(rate or ffmpeg.FALLBACK_FPS)
    # The header's count is wrong if it has more frames than the file has bytes.
    total = stream.frames if stream.frames <= container.size else 0
    start = ffmpeg.frame_time(first, stream)
    duration = _duration(path, container, stream, start, step)
    stated = _stated(container, stream, start or 0.0, step)  # after `_duration`, which makes FFmpeg find fragments
    return Video(
        path=path,
        duration_s=duration,
        width=width,
        height=height,
        rotation_deg=rotation,
        codec=stream.codec_context.codec.canonical_name,
        pix_fmt=stream.codec_context.pix_fmt or first.format.name,
        container=container.format.name,
        fps=float(rate) if rate else None,
        variable_rate=_variable_rate(stream),
        frames_total=total or None,
        start_s=start or 0.0,
        tags=ffmpeg.tags(container),
        mirrored=mirrored,
        stated_s=stated and max(stated, duration or 0.0),
    )


def _duration(
    path: str, container: InputContainer, stream: VideoStream, start: float | None, step: float
) -> float | None:
    # The header is not trusted where packets have times: it includes audio, may count from zero instead of from the first
    # frame, and does not know that the file was cut off.
    if start is None:
        return step * sum(1 for _ in _all_packets(path))
    if container.format.name == "avi":
        # If the index does not list as many frames as the header, the file was cut off, or has gaps.
        if stream.frames == len(stream.index_entries):
            return step * stream.frames
        times = [float(p.dts * p.time_base) for p in _all_packets(path) if p.dts is not None]
        return max(times) - min(times) + step if times else None
    end = _end(_tail_packets(container, stream), step)
    if end is None:
        end = _end(_all_packets(path), step)
    return None if end is None else end - start


def _stated(container: InputContainer, stream: VideoStream, start: float, step: float) -> float | None:
    """See `Video.stated_s`. Containers whose duration FFmpeg estimates from their content state none."""
    name = container.format.name
    if name == "avi":
        return step * stream.frames or None
    if name == ffmpeg.MOV and len(stream.index_entries):  # decoding times, a little earlier than display
        return float(stream.index_entries[-1].timestamp * stream.time_base) + step - start
    if name in ffmpeg.DENSE and container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base - start
    return None


def _end(found: Iterable[Packet | None], step: float) -> float | None:
    """When the last of these packets leaves the screen; `step` replaces durations that are not stored."""
    displayed = (p for p in found if p is not None and p.pts is not None and not p.is_discard)
    ends = (float(p.pts * p.time_base) + (float((p.duration or 0) * p.time_base) or step) for p in displayed)
    return max(ends, default=None)


def _tail_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet | None]:
    """Packets of the last seconds; none if FFmpeg cannot seek there."""
    if container.duration is None:
        return
    end = ((container.start_time or 0) + container.duration) / av.time_base
    try:
        container.seek(math.floor((end - TAIL_S) / stream.time_base), stream=stream)
    except av.error.FFmpegError:
        return
    yield from ffmpeg.packets(container, stream)


def _all_packets(path: str) -> Iterator[Packet]:
    """Those of the stream that are not empty."""
    with ffmpeg.open_video(path) as container:
        yield from (
            p for p in ffmpeg.packets(container, ffmpeg.video_stream(container, path)) if p is not None and p.size
        )


def _variable_rate(stream: VideoStream) -> bool | None:
    if stream.frames < 3 or len(stream.index_entries) != stream.frames:
        return None  # only MP4 and related containers list every frame in advance
    steps = np.diff([entry.timestamp for entry in stream.index_entries])
    return bool(np.ptp(steps) * stream.time_base > RATE_JITTER_S)
