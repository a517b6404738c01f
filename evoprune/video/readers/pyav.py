"""Video files by PyAV, which continues after damage, and opens everything that FFmpeg opens.

`probe` decodes no more than the first frame, `intervals` all of them; `read`, those on screen at given times, jumps over long gaps.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from evoprune.errors import VideoError
from evoprune.video.info import Video
from evoprune.video.readers import colour, ffmpeg

RATE_JITTER_S = 0.0025  # frame intervals that differ by less are constant: Matroska rounds times to milliseconds
# Jump over gaps longer than this, in seconds, instead of decoding all frames in between. Keyframes are commonly 1 to 10 s
# apart; a jump lands on the one before the wanted time, so short jumps would decode the same frames again. Where keyframes
# turn out to be further apart than this, only longer jumps are made.
MIN_JUMP_S = 4.0

TimedFrame = tuple[float, VideoFrame]  # seconds from the first frame; the decoder's own pixels, not yet rotated


def probe(path: str, container: InputContainer) -> Video:
    """See `evoprune.video.frames.probe`; `container`: the opened file."""
    stream = ffmpeg.video_stream(container, path)
    if container.format.name.endswith("_pipe"):  # FFmpeg's names for single pictures: jpegxl_pipe and so on
        hint = f"convert it to JPEG or PNG; {', '.join(ffmpeg.PICTURES)} are read"
        raise VideoError(f"{path} is a picture of a kind that is not read ({stream.codec_context.codec.name})", hint)
    header = colour.stated(stream)
    first = next(ffmpeg.decoded_frames(container, stream), None)
    if first is None:
        raise ffmpeg.nothing_decoded(path)
    rotation, mirrored = ffmpeg.orientation(first)
    width, height = ffmpeg.turned_size((first.width, first.height), rotation)
    rate = stream.average_rate or stream.guessed_rate
    step = 1 / float(rate or ffmpeg.FALLBACK_FPS)
    # The header's count is wrong if it has more frames than the file has bytes.
    total = stream.frames if stream.frames <= container.size else 0
    start = ffmpeg.frame_time(first, stream)
    duration, stated, restarts = _lengths(path, stream, start, step)
    variable_rate = None
    # Only MP4 and related containers list every frame in advance; fragments were found when packets were read.
    if 3 <= stream.frames == len(stream.index_entries):
        steps = np.diff([entry.timestamp for entry in stream.index_entries])
        variable_rate = bool(np.ptp(steps) * stream.time_base > RATE_JITTER_S)
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
        variable_rate=variable_rate,
        frames_total=total or None,
        start_s=start or 0.0,
        tags=ffmpeg.tags(container),
        mirrored=mirrored,
        stated_s=stated and max(stated, duration or 0.0),
        clock_restarts=restarts,
        other_tracks=len(ffmpeg.moving(container)) - 1,
        **ffmpeg.shown_otherwise(stream, colour.hdr_format(first, header), first),
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


def _measured(packets: Iterable[Packet | None], container: str, step: float) -> _Times | None:
    """`step` replaces durations that are not stored. None without a packet that has a time.

    Frames that are stored out of order have no duration of their own in MP4: it is the difference of two decoding times. That of
    the packet that is stored last is none, and replaces that of the frame displayed last.
    """
    times = None
    for packet in packets:
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


def _lengths(
    path: str, stream: VideoStream, start: float | None, step: float
) -> tuple[float | None, float | None, int]:
    """The duration, `Video.stated_s`, and how often the file's clock starts anew.

    The header is not trusted where packets have times: it includes audio, may count from zero instead of from the first frame, and
    does not know that the file was cut off. Containers whose duration FFmpeg estimates from their content state none.
    """
    container, name = stream.container, stream.container.format.name
    if name == "avi":
        stated, further = step * stream.frames or None, _further_avis(path)
        if start is None:
            return step * sum(1 for _ in _all_packets(path)), stated, further
        # If the index does not list as many frames as the header, the file was cut off, or has gaps.
        if stream.frames == len(stream.index_entries) and not further:
            return stated or 0.0, stated, 0
        decoded = [float(p.dts * p.time_base) for p in _all_packets(path) if p.dts is not None]
        return max(decoded) - min(decoded) + step if decoded else None, stated, further
    if start is None:
        return step * sum(1 for _ in _all_packets(path)), None, 0
    times = _measured(_tail_packets(container, stream), name, step)
    if times is None or times.restarts or (name in ffmpeg.JOINED and _seen_to_restart(container, stream, times)):
        times = _measured(_all_packets(path), name, step)
    if times is None:
        return None, None, 0
    duration = times.parts_s + times.last_s + times.length_s - (times.first_s if times.restarts else start)
    stated = None
    if name == ffmpeg.MOV and len(stream.index_entries):
        missing = float(stream.index_entries[-1].timestamp * stream.time_base) - times.decoded_s
        stated = duration + max(0.0, missing)
    elif name in ffmpeg.DENSE and container.duration is not None and len(container.streams) == 1:
        stated = max(container.duration / av.time_base - start, duration)
        # It includes the wrong duration of a frame that was copied from an MP4, see `_measured`.
        if stated - duration > 0.5 and (every := _measured(_all_packets(path), name, step)):
            stated = stated if every.claimed_s - start < stated - 1e-2 else duration
    return duration, stated, times.restarts


def _further_avis(path: str) -> int:
    """How many AVI files follow the first one in a file; FFmpeg reads them, and counts the first one alone."""
    count, end = -1, 0
    with open(path, "rb") as file:
        for _ in range(1000):  # no more parts are looked for
            file.seek(end)
            head = file.read(12)
            if head[:4] != b"RIFF":
                break
            count += head[8:] == b"AVI "  # the parts of one large file are called AVIX
            end += 8 + int.from_bytes(head[4:8], "little")
    return max(0, count)


def _seen_to_restart(container: InputContainer, stream: VideoStream, tail: _Times) -> bool:
    """Whether the times in a file without an index do not grow as one goes through it, as far as 64 places show."""
    begun, places = [], []
    for place in range(64):
        try:
            container.seek(container.size * place // 64, unsupported_byte_offset=True)
        except av.error.FFmpegError:
            return False
        packets = (p for p in ffmpeg.packets(container, stream) if p is not None and p.dts is not None)
        times = [float(p.dts * p.time_base) for p in islice(packets, 1 if place else 250)]
        if not times:  # nor is there one later
            break
        begun, places = begun or times, places + times[:1]
    places.append(tail.decoded_s)
    steps = np.diff(places)
    longest = ffmpeg.LONGEST_GAP_S + 10 * np.median(steps) if len(steps) else 0.0
    return any(np.diff(begun) < -ffmpeg.BACK_S) or any(steps < -ffmpeg.BACK_S) or any(steps > longest)


def _tail_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet | None]:
    """Packets of the last 3 s, as the frame displayed last may not be the one stored last; none if FFmpeg cannot seek there."""
    if container.duration is None:
        return
    end = ((container.start_time or 0) + container.duration) / av.time_base
    try:
        container.seek(math.floor((end - 3) / stream.time_base), stream=stream)
    except av.error.FFmpegError:
        return
    yield from ffmpeg.packets(container, stream)


def _all_packets(path: str) -> Iterator[Packet]:
    """Those of the stream that are not empty."""
    with ffmpeg.open_video(path) as container:
        packets = ffmpeg.packets(container, ffmpeg.video_stream(container, path))
        yield from (packet for packet in packets if packet is not None and packet.size)


def read(info: Video, times_s: Sequence[float], damaged: ffmpeg.Damage) -> ffmpeg.Frames:
    """As `readers` says. Holds two decoded frames at a time; `damaged` may be called more than once for the same damage."""
    # Where files are joined, frames that do not say what they are may be of another file than the first one.
    converter = colour.Converter(info.path, None if info.clock_restarts else info.hdr_format)
    converted, rgb = None, None
    with ffmpeg.reading(info.path), closing(_on_screen(info, times_s, damaged)) as on_screen:
        for time, frame in on_screen:
            if frame is not converted:
                converted = frame
                rgb = ffmpeg.to_rgb(frame, info.width, info.height, info.rotation_deg, info.mirrored, converter)
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
    for back in (
        0.0,
        4.0,
        16.0,
    ):  # a jump may land after the wanted time (MPEG-TS has no index): then earlier ones are tried
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
