"""What is in a video file: `probe` decodes no more than its first frame, `scan` all of it."""

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from evoprune.errors import VideoError
from evoprune.video.info import PICTURE, ScanResult, Video
from evoprune.video.readers import ffmpeg, folder, pyav
from evoprune.video.readers.pixels import orientation, turned_size
from evoprune.video.readers.signatures import PICTURES, picture_format

# The video's end is read from the packets of its last seconds: the frame displayed last is not always the one stored last.
TAIL_S = 3.0
RATE_JITTER_S = 0.0025  # frame intervals that differ by less are constant: Matroska rounds times to milliseconds


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
        packets = ffmpeg.packets(container, ffmpeg.video_stream(container, path))
        yield from (packet for packet in packets if packet is not None and packet.size)


def _variable_rate(stream: VideoStream) -> bool | None:
    if stream.frames < 3 or len(stream.index_entries) != stream.frames:
        return None  # only MP4 and related containers list every frame in advance
    steps = np.diff([entry.timestamp for entry in stream.index_entries])
    return bool(np.ptp(steps) * stream.time_base > RATE_JITTER_S)


def scan(path: str, folder_fps: float) -> ScanResult:
    """See `evoprune.video.probe.scan`."""
    began = time.perf_counter()
    info = probe(path, folder_fps)
    if info.kind == PICTURE:
        raise VideoError(f"{path} is a picture, which has nothing to scan", "leave out --scan")
    reader = folder if info.container == folder.CONTAINER else pyav
    damage, frames, end_s = set(), 0, 0.0
    gaps, keyframes = Counter(), Counter()  # intervals by their length, rounded so that equal ones count together
    with ffmpeg.reading(path):
        for time_s, length_s, key in reader.intervals(info, damage.add):
            if not frames:
                first_s = last_s = key_s = time_s
            else:
                gaps[round(time_s - last_s, 4)] += 1
                if key:
                    keyframes[round(time_s - key_s, 4)] += 1
                    key_s = time_s
            frames, last_s, end_s = frames + 1, time_s, max(end_s, time_s + length_s)
    if not frames:
        raise ffmpeg.nothing_decoded(path)
    keyframes[round(end_s - key_s, 4)] += 1
    median_gap = _median(gaps)
    irregular = sum(n for gap, n in gaps.items() if abs(gap - median_gap) > RATE_JITTER_S)
    return ScanResult(
        frames=frames,
        damaged=len(damage),
        duration_s=end_s - first_s,
        stated_s=info.stated_s,
        variable_rate=irregular > len(damage),
        largest_gap_s=max(gaps, default=0.0),
        keyframe_median_s=_median(keyframes),
        keyframe_max_s=max(keyframes),
        seconds=time.perf_counter() - began,
    )


def _median(counts: Counter[float]) -> float:
    values = sorted(counts)
    half = sum(counts.values()) / 2
    sums = accumulate(counts[value] for value in values)
    return next((value for value, so_far in zip(values, sums, strict=True) if so_far >= half), 0.0)
