"""What a video file is, and how long: `probe` decodes no more than the first frame. `parts`: of a file that was joined."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from evoprune.errors import VideoError
from evoprune.video.info import Video
from evoprune.video.readers import colour, ffmpeg
from evoprune.video.readers.ffmpeg import Span
from evoprune.video.readers.parts import AVI_ENTRY_BYTES, avi_index, cut_off, has_encrypted_track, spans
from evoprune.video.readers.sizes import stored_sizes

RATE_JITTER_S = 0.0025  # frame intervals that differ by less are constant: Matroska rounds times to milliseconds
# A file whose packets are all read to find its length may have so many, or one for each so many bytes of the file if that is more.
MAX_PACKETS = 2**18
BYTES_PER_PACKET = 128
RATE_PACKETS = 100  # by which the rate of frames is measured where none is stated


def probe(path: str) -> Video:
    """See `evoprune.video.frames.probe`. Of a joined file the size is that of its largest part."""
    every = parts(path)
    first = every[0].info
    broken = cut_off(path, every[-1].span[0])
    if len(every) == 1:
        return replace(first, cut_off=broken)
    infos = [part.info for part in every]
    largest = max(infos, key=_area)
    same_rate = all(info.fps == first.fps for info in infos)
    return replace(
        first,
        duration_s=_sum([info.duration_s for info in infos]),
        width=largest.width,
        height=largest.height,
        fps=first.fps if same_rate else None,
        variable_rate=None,
        frames_total=_sum([info.frames_total for info in infos]),
        stated_s=_sum([info.stated_s for info in infos]),
        clock_restarts=sum(info.clock_restarts + 1 for info in infos) - 1,
        clock_gap_s=max(info.clock_gap_s for info in infos),
        changes_size=any(
            info.changes_size or (info.width, info.height) != (first.width, first.height) for info in infos
        ),
        hdr=any(info.hdr for info in infos),
        hdr_format=next((info.hdr_format for info in infos if info.hdr_format), None),
        interlaced=any(info.interlaced for info in infos),
        rate_guessed=any(info.rate_guessed for info in infos),
        cut_off=broken,
    )


def _area(info: Video) -> int:
    return info.width * info.height


def _sum(values: Sequence[float | None]) -> float | None:
    """Add values; None if one of them is not known."""
    if None in values:
        return None
    return sum(values)


@dataclass(frozen=True)
class Part:
    """Describe one of the files that a joined file consists of.

    `info` counts times from its own first frame, which comes at `begin_s`.
    """

    span: Span
    info: Video
    begin_s: float


def parts(path: str, damaged: ffmpeg.Damage = ffmpeg.ignore_damage) -> list[Part]:
    """Return the parts, at least one. Those behind it that cannot be read are left out, and `damaged` is called for each.

    Raises VideoError: nothing in the first can be decoded, or as `ffmpeg.open_video` and `spans`.
    """
    ffmpeg.check_file(path)
    found: list[Part] = []
    begin_s = 0.0
    for span in spans(path):
        ffmpeg.alive()
        try:
            with ffmpeg.open_video(path, span) as container:
                info = _probe(path, span, container)
        except (VideoError, av.error.FFmpegError):
            if not found:
                raise
            damaged(span)
            continue
        found.append(Part(span, info, begin_s))
        begin_s += info.duration_s or 0.0
    return found


def parts_of(info: Video, damaged: ffmpeg.Damage) -> list[Part]:
    """Return the parts of a file that was probed before, which is not probed again unless it was joined."""
    ffmpeg.check_file(info.path)
    found = spans(info.path)
    if len(found) == 1:
        return [Part(found[0], info, 0.0)]
    return parts(info.path, damaged)


def _probe(path: str, span: Span, container: InputContainer) -> Video:
    stream = ffmpeg.video_stream(container, path)
    if container.format.name.endswith("_pipe"):  # FFmpeg's names for single pictures: jpegxl_pipe and so on
        hint = f"convert it to JPEG or PNG; {', '.join(ffmpeg.PICTURES)} are read"
        raise VideoError(f"{path} is a picture of a kind that is not read ({stream.codec_context.codec.name})", hint)
    log = ffmpeg.stream_log(stream)
    ffmpeg.check_encryption(stream, log, path)
    if container.format.name == ffmpeg.MOV and has_encrypted_track(path, span):
        raise ffmpeg.encrypted(path)
    header = colour.stated(stream, log)
    crop = ffmpeg.cropping(log)
    first = next(ffmpeg.decoded_frames(stream, ffmpeg.packets(container, stream), crop=crop), None)
    if first is None:
        raise ffmpeg.nothing_decoded(path)
    rotation, mirrored = ffmpeg.orientation(first)
    rate, guessed = ffmpeg.frame_rate(stream)
    rate = rate or _measured_rate(path, span)
    step = 1 / (rate or ffmpeg.FALLBACK_FPS)
    # The header's count is wrong if it has more frames than the file has bytes.
    total = stream.frames if stream.frames <= container.size else 0
    start = ffmpeg.frame_time(first, stream)
    lengths = _lengths(path, span, stream, start, step)
    variable_rate = None
    # Only MP4 and related containers list every frame in advance, less those that an edit list cuts away; fragments were found when
    # packets were read.
    shown = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
    if 3 <= stream.frames == len(stream.index_entries) or len(shown) < len(stream.index_entries):
        total = len(shown)
        steps = np.diff(shown)
        variable_rate = len(steps) > 1 and bool(np.ptp(steps) * stream.time_base > RATE_JITTER_S)
    sizes = stored_sizes(container, stream, first, crop, lengths.duration_s)
    width, height = ffmpeg.turned_size(max(sizes, key=math.prod), rotation)
    _check_decodable(path, span, width * height, total or math.ceil((lengths.duration_s or 0.0) / step))
    return Video(
        path=path,
        duration_s=lengths.duration_s,
        width=width,
        height=height,
        rotation_deg=rotation,
        crop=crop,
        codec=stream.codec_context.codec.canonical_name,
        pix_fmt=first.format.name,
        container=container.format.name,
        fps=rate,
        rate_guessed=guessed,
        variable_rate=variable_rate,
        frames_total=total or None,
        start_s=start or 0.0,
        tags=ffmpeg.tags(container),
        mirrored=mirrored,
        stated_s=lengths.stated_s and max(lengths.stated_s, lengths.duration_s or 0.0),
        clock_restarts=lengths.restarts,
        clock_gap_s=lengths.gap_s,
        changes_size=len(sizes) > 1,
        other_tracks=len(ffmpeg.moving(container)) - 1,
        has_sound=bool(container.streams.audio),
        **ffmpeg.shown_otherwise(stream, colour.hdr_format(first, header), first),
    )


def _check_decodable(path: str, span: Span, pixels: int, frames: int) -> None:
    """Raises VideoError for a decompression bomb: a part of a file with more pixels in all its frames than its size allows."""
    size = span[1] - span[0]
    decoded = pixels * min(frames, size)  # a frame has a byte at least
    if decoded > max(ffmpeg.MAX_DECODED_PIXELS, ffmpeg.MAX_PIXELS_PER_BYTE * size):
        message = f"{path} has {decoded / 10**9:,.0f} billion pixels in {frames:,} frames, too many for {size:,} bytes"
        raise VideoError(message, "it is damaged, or made to do harm; else convert it to smaller frames, or to fewer")


@dataclass
class _Times:
    """Sum up the times of some packets, in seconds; where a clock restarts in parts, one part after the other."""

    first_s: float  # of the part that is read: the earliest frame, the latest, how long it lasts
    last_s: float
    length_s: float
    decoded_s: float  # the time at which the packet that is stored last is decoded
    claimed_s: float  # the latest end by the word of any packet
    counted_s: float = 0.0  # of the same part, the durations of all packets together
    parts_s: float = 0.0  # of the parts before
    restarts: int = 0
    gap_s: float = 0.0  # the largest step ahead that was taken for a restart

    def part_s(self, container: str, step: float) -> float:
        """Return how long the part lasts that is read; `step` replaces the length of its last frame."""
        stamped_s = self.last_s - self.first_s + step
        if misses_one(stamped_s - self.counted_s, step, container):
            return self.counted_s
        return stamped_s


def _measured(packets: Iterable[Packet | None], container: str, step: float) -> _Times | None:
    """Measure the times of packets; None without a packet that has a time. `step` replaces durations that are not stored.

    Frames that are stored out of order have no duration of their own in MP4: it is the difference of two decoding times. That of
    the packet that is stored last is none, and replaces that of the frame displayed last.
    """
    times = None
    for packet in packets:
        if packet is None or packet.pts is None or packet.is_discard:
            continue
        time_base = packet.time_base
        tick, per = time_base.numerator, time_base.denominator  # fractions would take several times as long
        shown = packet.pts * tick / per
        stamp = packet.pts if packet.dts is None else packet.dts
        decoded = stamp * tick / per
        length = (packet.duration or 0) * tick / per or step
        # Elsewhere decoding times are FFmpeg's guess; but no keyframe is displayed before what is stored before it.
        stored = container in ffmpeg.JOINED
        key = packet.is_keyframe
        if times is None:
            times = _Times(shown, shown, length, decoded, shown + length)
        passed = decoded - times.decoded_s if stored else key * (shown - times.last_s)
        if ffmpeg.restarts(passed, container):
            times.parts_s += times.part_s(container, step)
            times.first_s = times.last_s = shown
            times.counted_s = 0.0
            times.restarts += 1
            times.gap_s = max(times.gap_s, passed)
        times.first_s = min(times.first_s, shown)
        times.last_s = max(times.last_s, shown)
        times.claimed_s = max(times.claimed_s, shown + length)
        times.length_s = length
        times.decoded_s = decoded
        times.counted_s += length
    return times


@dataclass
class _Lengths:
    """Hold `Video.duration_s`, `Video.stated_s`, and how often the file's clock starts anew, with its largest step ahead."""

    duration_s: float | None
    stated_s: float | None = None
    restarts: int = 0
    gap_s: float = 0.0


def _lengths(path: str, span: Span, stream: VideoStream, start: float | None, step: float) -> _Lengths:
    """Measure the length of a video, and read the stated one.

    The header is not trusted where packets have times: it includes audio, may count from zero instead of from the first frame,
    and does not know that the file was cut off. Containers whose duration FFmpeg estimates from their content state none.
    """
    container = stream.container
    name = container.format.name
    if name == ffmpeg.AVI:
        return _lengths_in_avi(path, span, stream, start, step)
    if start is None:
        return _Lengths(step * sum(1 for _ in _all_packets(path, span)))
    times = _measured(_tail_packets(path, container, stream), name, step)
    if times is None or times.restarts or (name in ffmpeg.JOINED and _seen_to_restart(container, stream, times)):
        times = _measured(_all_packets(path, span), name, step)
    if times is None:
        return _Lengths(None)
    duration = times.last_s + times.length_s - start
    if times.restarts:
        duration = times.parts_s + times.part_s(name, times.length_s)
    stated = None
    if name == ffmpeg.MOV and len(stream.index_entries):
        stated = duration
        if listed := next((entry for entry in reversed(stream.index_entries) if not entry.is_discard), None):
            stated += max(0.0, float(listed.timestamp * stream.time_base) - times.decoded_s)
    elif name in ffmpeg.DENSE and container.duration is not None and len(container.streams) == 1:
        stated = max(container.duration / av.time_base - start, duration)
        # It includes the wrong duration of a frame that was copied from an MP4, see `_measured`.
        if stated - duration > 0.5:
            every = _measured(_all_packets(path, span), name, step)
            if every and every.claimed_s - start >= stated - 1e-2:
                stated = duration
    return _Lengths(duration, stated, times.restarts, times.gap_s)


def _lengths_in_avi(path: str, span: Span, stream: VideoStream, start: float | None, step: float) -> _Lengths:
    frames = stream.frames if stream.frames <= stream.container.size else 0  # written to a pipe it claims 2**30
    stated = step * frames or None
    if start is None:
        return _Lengths(step * sum(1 for _ in _all_packets(path, span)), stated)
    # If the index does not list as many frames as the header, the file was cut off. FFmpeg's lacks frames without data.
    if frames and frames in (len(stream.index_entries), _listed_in_avi(path, span, stream.index)):
        return _Lengths(stated, stated)
    decoded = [float(p.dts * p.time_base) for p in _all_packets(path, span) if p.dts is not None]
    if not decoded:
        return _Lengths(None, stated)
    return _Lengths(max(decoded) - min(decoded) + step, stated)


def _listed_in_avi(path: str, span: Span, stream: int) -> int:
    """Return how many frames of a stream the index of an AVI lists; those without data repeat the frame before."""
    chunks = avi_index(path, span)
    names = {f"{stream:02}{kind}".encode() for kind in ("dc", "db")}
    return sum(chunks[at : at + 4] in names for at in range(0, len(chunks), AVI_ENTRY_BYTES))


def _measured_rate(path: str, span: Span) -> float | None:
    """Measure the frames a second by the times of the first packets; None if they have none."""
    stamps = [float(p.pts * p.time_base) for p in islice(_all_packets(path, span), RATE_PACKETS) if p.pts is not None]
    lasts_s = max(stamps, default=0.0) - min(stamps, default=0.0)
    if not lasts_s:
        return None
    return (len(stamps) - 1) / lasts_s


def _seen_to_restart(container: InputContainer, stream: VideoStream, tail: _Times) -> bool:
    """Return whether the times in a file without an index do not grow as one goes through it, as far as 64 places show."""
    begun = []
    places = []
    for place in range(64):
        try:
            container.seek(container.size * place // 64, unsupported_byte_offset=True)
        except av.error.FFmpegError:
            return False
        packets = (p for p in ffmpeg.packets(container, stream) if p is not None and p.dts is not None)
        count = 1 if place else 250
        times = [float(p.dts * p.time_base) for p in islice(packets, count)]
        if not times:  # nor is there one later
            break
        begun = begun or times
        places = places + times[:1]
    places.append(tail.decoded_s)
    steps = np.diff(places)
    longest = ffmpeg.LONGEST_GAP_S + 10 * np.median(steps) if len(steps) else 0.0
    return any(np.diff(begun) < -ffmpeg.BACK_S) or any(steps < -ffmpeg.BACK_S) or any(steps > longest)


def _tail_packets(path: str, container: InputContainer, stream: VideoStream) -> Iterator[Packet | None]:
    """Yield the packets of the last 3 s, as the frame displayed last may not be stored last; none if FFmpeg cannot seek there."""
    if container.duration is None:
        return
    end = ((container.start_time or 0) + container.duration) / av.time_base
    try:
        container.seek(math.floor((end - 3) / stream.time_base), stream=stream)
    except av.error.FFmpegError:
        return
    yield from _bounded(ffmpeg.packets(container, stream), path, container.size)


def _all_packets(path: str, span: Span) -> Iterator[Packet]:
    """Yield all packets of the stream; an empty one that has a time repeats the frame before it. Raises as `_bounded`."""
    with ffmpeg.open_video(path, span) as container:
        packets = _bounded(ffmpeg.packets(container, ffmpeg.video_stream(container, path)), path, container.size)
        yield from (packet for packet in packets if packet is not None and (packet.size or packet.dts is not None))


def _bounded(packets: Iterator[Packet | None], path: str, size: int) -> Iterator[Packet | None]:
    """Yield packets of a file of that size in bytes. Raises VideoError: too many, so that going through them would take minutes."""
    most = max(MAX_PACKETS, size // BYTES_PER_PACKET)
    for count, packet in enumerate(packets):
        if count > most:
            hint = "cut it into shorter videos, or convert it to MP4, e.g. with ffmpeg"
            raise VideoError(f"{path} has more than {most:,} frames in {size:,} bytes", hint)
        yield packet


def misses_one(late_s: float, length_s: float, container: str) -> bool:
    """Return whether a time by the clock is one frame wrong.

    MPEG-PS states a time for a pack of 2 KiB. If that holds several small frames, FFmpeg gives the time to the frame before its
    own, and counts on from there.
    """
    return container == ffmpeg.PROGRAM_STREAM and 0.5 * length_s < abs(late_s) < 1.5 * length_s
