"""What is in a video file: `probe` decodes no more than its first frame, `scan` all of it."""

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

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
# Of a file without an index: places at which a time is looked at, and packets at its beginning.
PLACES, FIRST_PACKETS = 64, 250
MOST_PARTS = 1000  # of a file, that are looked for
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
    times = None if start is None or container.format.name == "avi" else _times(path, container, stream, step)
    duration = _duration(path, stream, start, times, step)
    # After `_times`, which makes FFmpeg find fragments.
    stated = _stated(path, stream, start or 0.0, duration, times, step)
    return Video(
        path=path,
        duration_s=duration,
        width=width,
        height=height,
        rotation_deg=rotation,
        codec=stream.codec_context.codec.canonical_name,
        pix_fmt=first.format.name,
        container=container.format.name,
        fps=float(rate) if rate else None,
        variable_rate=_variable_rate(stream),
        frames_total=total or None,
        start_s=start or 0.0,
        tags=ffmpeg.tags(container),
        mirrored=mirrored,
        stated_s=stated and max(stated, duration or 0.0),
        clock_restarts=times.restarts if times else _further_avis(path) if container.format.name == "avi" else 0,
        other_tracks=len(ffmpeg.moving(container)) - 1,
        **ffmpeg.shown_otherwise(stream, first),
    )


@dataclass
class _Times:
    """What the times of some packets tell, in seconds; those of a clock that restarts in parts, one part after the other."""

    first_s: float  # of the part that is read: the earliest frame, the latest, how long it lasts
    last_s: float
    length_s: float
    decoded_s: float  # the time at which the packet that is stored last is decoded
    claimed_s: float  # the latest end by the word of any packet
    parts_s: float = 0.0  # of the parts before
    restarts: int = 0


def _times(path: str, container: InputContainer, stream: VideoStream, step: float) -> _Times | None:
    """Those of the last seconds where they tell all; else of all packets."""
    name = container.format.name
    found = _measured(_tail_packets(container, stream), name, step)
    if found is None or found.restarts or (name in ffmpeg.JOINED and _seen_to_restart(container, stream, found)):
        return _measured(_all_packets(path), name, step)
    return found


def _measured(found: Iterable[Packet | None], container: str, step: float) -> _Times | None:
    """`step` replaces durations that are not stored. None without a packet that has a time.

    Frames that are stored out of order have no duration of their own in MP4: it is the difference of two decoding times. That of
    the packet that is stored last is none, and replaces that of the frame displayed last.
    """
    times = None
    for packet in found:
        if packet is None or packet.pts is None or packet.is_discard:
            continue
        tick, per = packet.time_base.as_integer_ratio()  # fractions would take several times as long
        shown, decoded = packet.pts * tick / per, (packet.pts if packet.dts is None else packet.dts) * tick / per
        length = (packet.duration or 0) * tick / per or step
        # Elsewhere decoding times are FFmpeg's guess; but no keyframe is displayed before what is stored before it.
        stored, key = container in ffmpeg.JOINED, packet.is_keyframe
        if times is None:
            times = _Times(shown, shown, length, decoded, shown + length)
        elif ffmpeg.restarts(decoded - times.decoded_s if stored else key * (shown - times.last_s), container):
            times.parts_s += times.last_s - times.first_s + step
            times.first_s = times.last_s = shown
            times.restarts += 1
        times.first_s, times.last_s = min(times.first_s, shown), max(times.last_s, shown)
        times.claimed_s = max(times.claimed_s, shown + length)
        times.length_s, times.decoded_s = length, decoded
    return times


def _duration(path: str, stream: VideoStream, start: float | None, times: _Times | None, step: float) -> float | None:
    # The header is not trusted where packets have times: it includes audio, may count from zero instead of from the first
    # frame, and does not know that the file was cut off.
    if start is None:
        return step * sum(1 for _ in _all_packets(path))
    if stream.container.format.name == "avi":
        # If the index does not list as many frames as the header, the file was cut off, or has gaps.
        if stream.frames == len(stream.index_entries) and not _further_avis(path):
            return step * stream.frames
        decoded = [float(p.dts * p.time_base) for p in _all_packets(path) if p.dts is not None]
        return max(decoded) - min(decoded) + step if decoded else None
    if times is None:
        return None
    return times.parts_s + times.last_s + times.length_s - (times.first_s if times.restarts else start)


def _further_avis(path: str) -> int:
    """How many AVI files follow the first one in a file; FFmpeg reads them, and counts the first one alone."""
    found, end = -1, 0
    with open(path, "rb") as file:
        for _ in range(MOST_PARTS):
            file.seek(end)
            head = file.read(12)
            if head[:4] != b"RIFF":
                break
            found += head[8:] == b"AVI "  # the parts of one large file are called AVIX
            end += 8 + int.from_bytes(head[4:8], "little")
    return max(0, found)


def _stated(
    path: str, stream: VideoStream, start: float, duration: float | None, times: _Times | None, step: float
) -> float | None:
    """See `Video.stated_s`. Containers whose duration FFmpeg estimates from their content state none."""
    container = stream.container
    name = container.format.name
    if name == "avi":
        return step * stream.frames or None
    if times is None or duration is None:
        return None
    if name == ffmpeg.MOV and len(stream.index_entries):
        return duration + max(0.0, float(stream.index_entries[-1].timestamp * stream.time_base) - times.decoded_s)
    if name in ffmpeg.DENSE and container.duration is not None and len(container.streams) == 1:
        stated = max(container.duration / av.time_base - start, duration)
        # It includes the wrong duration of a frame that was copied from an MP4, see `_measured`.
        if stated - duration > 0.5 and (every := _measured(_all_packets(path), name, step)):
            stated = stated if every.claimed_s - start < stated - 1e-2 else duration
        return stated
    return None


def _seen_to_restart(container: InputContainer, stream: VideoStream, tail: _Times) -> bool:
    """Whether the times in a file without an index do not grow as one goes through it, as far as a few places show."""
    begun, places = [], []
    for place in range(PLACES):
        try:
            container.seek(container.size * place // PLACES, unsupported_byte_offset=True)
        except av.error.FFmpegError:
            return False
        packets = (p for p in ffmpeg.packets(container, stream) if p is not None and p.dts is not None)
        times = [float(p.dts * p.time_base) for p in islice(packets, 1 if place else FIRST_PACKETS)]
        if not times:  # nor is there one later
            break
        begun, places = begun or times, places + times[:1]
    places.append(tail.decoded_s)
    steps = np.diff(places)
    longest = ffmpeg.LONGEST_GAP_S + 10 * np.median(steps) if len(steps) else 0.0
    return any(np.diff(begun) < -ffmpeg.BACK_S) or any(steps < -ffmpeg.BACK_S) or any(steps > longest)


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
            frames, last_s, end_s = frames + 1, time_s, time_s + length_s
    if not frames:
        raise ffmpeg.nothing_decoded(path)
    if info.duration_s is not None and first_s + info.duration_s > last_s:  # see `_measured`
        end_s = min(end_s, first_s + info.duration_s)
    keyframes[round(end_s - key_s, 4)] += 1
    median_gap = _median(gaps)
    irregular = sum(n for gap, n in gaps.items() if abs(gap - median_gap) > RATE_JITTER_S)
    return ScanResult(
        frames=frames,
        damaged=max(0, len(damage) - info.clock_restarts),  # at each joint a packet may be incomplete
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
