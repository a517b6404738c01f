"""Reads a video file's metadata and measures its duration, decoding only the first frame."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from evoprune.errors import VideoError
from evoprune.video.info import Video
from evoprune.video.readers import colour, ffmpeg
from evoprune.video.readers.clock import BACK_S, FORWARD_S, WITH_DECODING_TIMES, Clock, longest_gap_s

# Frame intervals that differ by less than this are considered constant, because Matroska rounds timestamps to milliseconds.
RATE_JITTER_S = 0.0025
# If determining the duration requires reading all packets, a file with more than `MAX_PACKETS` packets is rejected unless its
# packets have at least `BYTES_PER_PACKET` bytes on average.
MAX_PACKETS = 2**18
BYTES_PER_PACKET = 128
MAX_BOXES = 2**20  # maximum number of MP4 boxes to examine, which takes about a second; each fragment has two boxes
# First bytes of an encrypted track's entry in the sample description table (stsd) of an MP4.
ENCRYPTED_TRACK = b"encv" + bytes(6)
AVI_ENTRY_BYTES = 16  # size of an entry in the index at the end of an AVI
TRAILING_BYTES = 2**20  # number of bytes after the last packet to search for another file
# Signatures of Matroska, FLV, and ASF, and the signatures that follow the initial length field in MP4 and AVI.
STARTS = (b"\x1aE\xdf\xa3", b"FLV\x01", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"ftyp", b"AVI LIST")
# Number of bytes to compare in all other containers, in which all files begin with the same bytes. Fewer bytes would also match the
# start of each partition in an MXF file.
START_BYTES = 14
SMALLEST_SPAN = 2**16  # number of bytes within which a jump in the timestamps is not searched for any further
RATE_PACKETS = 100  # number of packets from which to measure an unspecified frame rate


def probe(path: str) -> Video:
    """Read a video file's metadata. See `evoprune.video.frames.probe`."""
    with ffmpeg.open_video(path) as container:
        return _probe(path, container)


def _probe(path: str, container: InputContainer) -> Video:
    stream = ffmpeg.video_stream(container, path)
    # FFmpeg's names for single-image formats have this suffix, for example jpegxl_pipe.
    if container.format.name.endswith("_pipe"):
        hint = f"convert it to JPEG or PNG; supported formats: {', '.join(ffmpeg.PICTURES)}"
        raise VideoError(f"{path} is an image in an unsupported format ({stream.codec_context.codec.name})", hint)
    log = ffmpeg.stream_log(stream)
    ffmpeg.check_encryption(stream, log, path)
    if container.format.name == ffmpeg.MOV and _has_encrypted_track(path):
        raise ffmpeg.encrypted(path)
    header = colour.stated(stream, log)
    crop = ffmpeg.cropping(log)
    first = next(ffmpeg.decoded_frames(stream, ffmpeg.packets(container, stream), crop=crop), None)
    if first is None:
        raise ffmpeg.nothing_decoded(path)
    rotation, mirrored = ffmpeg.orientation(first)
    rate, guessed = ffmpeg.frame_rate(stream)
    rate = rate or _measured_rate(path)
    step = 1 / (rate or ffmpeg.FALLBACK_FPS)
    # The header is wrong if it specifies more frames than the file has bytes.
    total = stream.frames if stream.frames <= container.size else 0
    if container.format.name == ffmpeg.AVI and step > 1.5 * stream.time_base:
        total = 0  # it includes empty frames
    start = ffmpeg.frame_time(first, stream)
    lengths = _lengths(path, stream, start, step)
    variable_rate = None
    # Only MP4 and related containers list all frames in advance. Frames removed by an edit list are not counted. Frames in
    # fragments were added to the list while the packets were read.
    shown = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
    if 3 <= stream.frames == len(stream.index_entries) or len(shown) < len(stream.index_entries):
        total = len(shown)
        steps = np.diff(shown)
        variable_rate = len(steps) > 1 and bool(np.ptp(steps) * stream.time_base > RATE_JITTER_S)
    check_decodable(path, first.width * first.height, total or math.ceil((lengths.duration_s or 0.0) / step))
    shown_as = ffmpeg.shown_otherwise(stream, colour.hdr_format(first, header), first)
    width, height = ffmpeg.displayed_size(first, shown_as["pixel_aspect"], rotation)
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
        joined=_is_joined(path, container.format.name, lengths),
        other_tracks=len(ffmpeg.moving(container)) - 1,
        has_sound=bool(container.streams.audio),
        **shown_as,
    )


def _is_joined(path: str, container: str, lengths: "_Lengths") -> bool:
    """Return True if another file was appended to a file. FFmpeg ignores it or reads it with the first file's header."""
    if container in ffmpeg.JOINED:
        return False
    return lengths.restarts > 0 or another_follows(path, container, lengths.end)


def another_follows(path: str, container: str, end: int) -> bool:
    """Return True if another file was appended to a file (`cat a.mkv b.mkv`). Only a few offsets in the file are checked.

    Args:
        end: Offset of the first byte after the last packet read by FFmpeg, or 0 if packets have no timestamps. The appended file
            may begin at this offset or after an index.
    """
    with open(path, "rb", buffering=0) as file:
        if container == ffmpeg.MOV:
            return sum(kind == b"moov" for kind, _, _ in _boxes(file)) > 1
        own = file.read(START_BYTES)
        file.seek(end)
        trailing = file.read(TRAILING_BYTES)
        return end > 0 and any(start in trailing for start in (own, *STARTS))


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type, start offset, and end offset of each top-level box in an MP4 or MOV file."""
    at = 0
    for _ in range(MAX_BOXES):
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        if size < 8:  # not a box, or a box that extends to the end of the file
            size = os.fstat(file.fileno()).st_size - at
        if size <= 0:
            return
        yield head[4:8], at, at + size
        at += size


def _has_encrypted_track(path: str) -> bool:
    """Return True if an MP4's index lists an encrypted video track. FFmpeg does not report all of them, such as PIFF tracks."""
    with open(path, "rb", buffering=0) as file:
        for kind, at, end in _boxes(file):
            if kind == b"moov":
                end = min(end, os.fstat(file.fileno()).st_size)  # the stated size of a damaged box may be huge
                file.seek(at)
                return ENCRYPTED_TRACK in file.read(end - at)
    return False


def check_decodable(path: str, pixels: int, frames: int) -> None:
    """Raise VideoError for a decompression bomb, a small file with far too many pixels for its size."""
    size = os.stat(path).st_size
    decoded = pixels * min(frames, size)  # a frame takes at least one byte
    if decoded > max(ffmpeg.MAX_DECODED_PIXELS, ffmpeg.MAX_PIXELS_PER_BYTE * size):
        message = f"{path} has {decoded / 10**9:,.0f} billion pixels in {frames:,} frames, too many for {size:,} bytes"
        raise VideoError(message, "it is damaged or malicious; otherwise convert it to fewer or smaller frames")


@dataclass
class _Times:
    """Running totals of corrected packet times, in seconds.

    If the times cannot be corrected, a new part begins whenever the file's clock restarts.
    """

    first_s: float  # display time of the earliest frame in the current part
    last_s: float  # display time of the latest frame in the current part
    length_s: float  # duration of the last stored packet
    decoded_s: float  # decoding time of the last stored packet
    claimed_s: float  # latest end time specified by any packet
    parts_s: float = 0.0  # total length of all earlier parts
    restarts: int = 0
    gap_s: float = 0.0  # largest forward jump interpreted as a restart
    end: int = 0  # offset of the first byte after the last packet

    def part_s(self, step: float) -> float:
        """Return the current part's length in seconds, assuming that its last frame lasts `step` seconds."""
        return self.last_s - self.first_s + step


def _measured(packets: Iterator[Packet | None], stream: VideoStream, step: float) -> _Times | None:
    """Summarize a file's packet times. Returns None if no packet has a timestamp.

    If an MP4 stores frames out of order, its packets have no real durations, and FFmpeg reports the differences between decoding
    times instead. Only the last stored packet has a real duration. The last displayed frame is assumed to have the same duration.

    Args:
        step: Duration in seconds for packets without a specified duration.
    """
    times = None
    container = stream.container.format.name
    clock = Clock(longest_gap_s(container))
    # In other containers, FFmpeg guesses the decoding times, so the display times of keyframes are compared instead. A keyframe is
    # displayed after all frames stored before it.
    by_keyframes = container not in WITH_DECODING_TIMES
    for packet in clock.steady(packets, stream):
        if packet is None or packet.pts is None or packet.is_discard:
            continue
        time_base = packet.time_base
        tick, per = time_base.numerator, time_base.denominator  # Fraction would be several times slower
        shown = packet.pts * tick / per
        stamp = packet.pts if packet.dts is None else packet.dts
        decoded = stamp * tick / per
        length = (packet.duration or 0) * tick / per or step
        if times is None:
            times = _Times(shown, shown, length, decoded, shown + length)
        if by_keyframes and packet.is_keyframe and shown - times.last_s < -BACK_S:
            times.parts_s += times.part_s(step)
            times.first_s = times.last_s = shown
            times.restarts += 1
        times.first_s = min(times.first_s, shown)
        times.last_s = max(times.last_s, shown)
        times.claimed_s = max(times.claimed_s, shown + length)
        times.length_s = length
        times.decoded_s = decoded
        times.end = max(times.end, (packet.pos or 0) + packet.size)
    if times is not None:
        times.restarts += clock.restarts
        times.gap_s = clock.gap_s
    return times


@dataclass
class _Lengths:
    """A video's measured and specified durations, and data on clock restarts. For the fields, see `Video` and `_Times`."""

    duration_s: float | None
    stated_s: float | None = None
    restarts: int = 0
    gap_s: float = 0.0
    end: int = 0  # offset of the first byte after the last packet; 0 if packets have no timestamps


def _lengths(path: str, stream: VideoStream, start: float | None, step: float) -> _Lengths:
    """Measure a video's duration and read the duration specified in its header.

    If the packets have timestamps, the duration is measured from them, because the duration in the header includes the audio, may
    count from zero instead of from the first frame, and does not show whether the file is truncated. If FFmpeg only estimates a
    container's duration from its contents, the header duration is None.

    Args:
        start: Timestamp of the first frame in seconds, or None if the file has no timestamps.
        step: Frame interval in seconds.
    """
    container = stream.container
    name = container.format.name
    if name == ffmpeg.AVI:
        return _lengths_in_avi(path, stream, start, step)
    if start is None:
        return _Lengths(step * sum(1 for _ in _all_packets(path)))
    times = _measured(_tail_packets(path, container, stream), stream, step)
    if times is None or times.restarts or (name in ffmpeg.JOINED and _seen_to_restart(container, stream, times)):
        times = _measured(_all_packets(path), stream, step)
    if times is None:
        return _Lengths(None)
    duration = times.last_s + times.length_s - start
    if times.restarts:
        duration = times.parts_s + times.part_s(times.length_s)
    stated = None
    if name == ffmpeg.MOV and len(stream.index_entries):
        stated = duration
        if listed := next((entry for entry in reversed(stream.index_entries) if not entry.is_discard), None):
            stated += max(0.0, float(listed.timestamp * stream.time_base) - times.decoded_s)
    elif name in ffmpeg.DENSE and container.duration is not None and len(container.streams) == 1:
        stated = max(container.duration / av.time_base - start, duration)
        # The header duration may be too long, because it may include an incorrect frame duration copied from an MP4 (see
        # `_measured`).
        if stated - duration > 0.5:
            every = _measured(_all_packets(path), stream, step)
            if every and every.claimed_s - start >= stated - 1e-2:
                stated = duration
    return _Lengths(duration, stated, times.restarts, times.gap_s, times.end)


def _lengths_in_avi(path: str, stream: VideoStream, start: float | None, step: float) -> _Lengths:
    # The header of an AVI written to a pipe specifies 2**30 frames.
    frames = stream.frames if stream.frames <= stream.container.size else 0
    tick = float(stream.time_base)  # the duration of a frame, or of an empty frame, which repeats the previous one
    stated = tick * frames or None
    if start is None:
        return _Lengths(step * sum(1 for _ in _all_packets(path)), stated)
    # If the index lists fewer frames than the header specifies, the file is truncated. FFmpeg's own index omits empty frames.
    if frames and frames in (len(stream.index_entries), _listed_in_avi(path, stream.index)):
        return _Lengths(stated, stated, end=_riff_end(path))
    decoded = [float(p.dts * p.time_base) for p in _all_packets(path) if p.dts is not None]
    if not decoded:
        return _Lengths(None, stated)
    return _Lengths(max(decoded) - min(decoded) + step, stated)


def _riff_end(path: str) -> int:
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8)[4:], "little")


def _listed_in_avi(path: str, stream: int) -> int:
    """Return the number of frames in the index at the end of an AVI, including empty frames, which repeat the previous frame."""
    names = {f"{stream:02}{kind}".encode() for kind in ("dc", "db")}
    with open(path, "rb", buffering=0) as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[4:], "little")
            if head[:4] == b"idx1":
                chunks = file.read(min(length, os.fstat(file.fileno()).st_size))
                return sum(chunks[at : at + 4] in names for at in range(0, len(chunks), AVI_ENTRY_BYTES))
            file.seek(length + length % 2, os.SEEK_CUR)
    return 0


def _measured_rate(path: str) -> float | None:
    """Measure the frame rate in frames per second using the first packets. Returns None if they have no timestamps."""
    stamps = [float(p.pts * p.time_base) for p in islice(_all_packets(path), RATE_PACKETS) if p.pts is not None]
    lasts_s = max(stamps, default=0.0) - min(stamps, default=0.0)
    if not lasts_s:
        return None
    return (len(stamps) - 1) / lasts_s


def _seen_to_restart(container: InputContainer, stream: VideoStream, tail: _Times) -> bool:
    """Return True if the timestamps jump in a file without an index, by checking them at 64 positions throughout the file."""

    def times_at(offset: int, count: int = 1) -> list[float]:
        container.seek(offset, unsupported_byte_offset=True)
        packets = (p for p in ffmpeg.packets(container, stream) if p is not None and p.dts is not None)
        return [float(p.dts * p.time_base) for p in islice(packets, count)]

    def jumps_between(start: int, end: int, start_s: float, end_s: float) -> bool:
        """Return True if the timestamps jump ahead between two offsets, instead of ascending in many small steps."""
        while end_s - start_s > longest_s and end - start > SMALLEST_SPAN:
            middle = (start + end) // 2
            middle_s = next(iter(times_at(middle)), end_s)
            if not start_s - BACK_S <= middle_s <= end_s + BACK_S:
                return True
            if middle_s - start_s > end_s - middle_s:
                end, end_s = middle, middle_s
            else:
                start, start_s = middle, middle_s
        return end_s - start_s > longest_s

    longest_s = longest_gap_s(container.format.name)
    offsets = [container.size * place // 64 for place in range(65)]
    try:
        beginning = times_at(0, 250)
        places = beginning[:1]
        for offset in offsets[1:-1]:
            if not (times := times_at(offset)):  # there are no packets at this position or at later positions
                break
            places += times
        places.append(tail.decoded_s)
        steps = np.diff(places)
        first_steps = np.diff(beginning)
        if any(first_steps < -BACK_S) or any(first_steps > FORWARD_S) or any(steps < -BACK_S):
            return True
        # The bit rate varies, so most of the long steps contain no jump.
        long = np.flatnonzero(steps > longest_s + 2 * np.median(steps))
        return any(jumps_between(*offsets[i : i + 2], *places[i : i + 2]) for i in long)
    except av.error.FFmpegError:
        return False


def _tail_packets(path: str, container: InputContainer, stream: VideoStream) -> Iterator[Packet | None]:
    """Yield the packets of the last 3 s, because the last frame may not be stored last. Yields nothing if FFmpeg can't seek."""
    if container.duration is None:
        return
    end = ((container.start_time or 0) + container.duration) / av.time_base
    try:
        container.seek(math.floor((end - 3) / stream.time_base), stream=stream)
    except av.error.FFmpegError:
        return
    yield from _bounded(ffmpeg.packets(container, stream), path, container.size)


def _all_packets(path: str) -> Iterator[Packet]:
    """Yield a file's video packets, including empty packets, which repeat a frame. Raises the same errors as `_bounded`."""
    with ffmpeg.open_video(path) as container:
        packets = _bounded(ffmpeg.packets(container, ffmpeg.video_stream(container, path)), path, container.size)
        yield from (packet for packet in packets if packet is not None and (packet.size or packet.dts is not None))


def _bounded(packets: Iterator[Packet | None], path: str, size: int) -> Iterator[Packet | None]:
    """Yield packets unchanged. Raises VideoError if there are too many of them for a file of `size` bytes (see `MAX_PACKETS`)."""
    most = max(MAX_PACKETS, size // BYTES_PER_PACKET)
    for count, packet in enumerate(packets):
        if count > most:
            hint = "cut it into shorter videos, or convert it to MP4, e.g. with ffmpeg"
            raise VideoError(f"{path} has more than {most:,} frames in {size:,} bytes", hint)
        yield packet
