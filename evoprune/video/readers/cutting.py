"""Cuts a clip out of a video, either by copying packets from a keyframe onward or by re-encoding frames. The audio is kept.

Audio packets are also copied, and re-encoded only if the clip's container does not support their codec.

FFmpeg writes the clip to memory, and `ClipReader.fill` returns its bytes together with their offset in the clip, so that the
process that opens the untrusted video does not need write permission. The offsets are needed because FFmpeg returns to the
beginning of an MP4 to complete it.
"""

import math
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from heapq import merge
from itertools import chain, islice, pairwise
from operator import attrgetter, itemgetter
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.codec import Codec
from av.container import OutputContainer
from av.filter import Graph
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter
from av.video.stream import VideoStream

from evoprune.backend import Host
from evoprune.errors import VideoError
from evoprune.video.info import CLIP_ENDINGS, TOLERANCE_S, Video
from evoprune.video.reader_table import FILES, reader_of
from evoprune.video.readers import ffmpeg
from evoprune.video.readers.deinterlacing import deinterlacing
from evoprune.video.readers.pyav import Picture, planned, start_decoding
from evoprune.video.readers.track import TimedFrame, Track, Unreachable

MP4, MATROSKA = CLIP_ENDINGS
FORMATS = {MP4: "mp4", MATROSKA: "matroska"}
# Codecs that players expect in an MP4. Clips with other codecs are written as Matroska files.
IN_MP4 = ("h264", "hevc", "av1", "mpeg4", "aac", "mp3", "ac3", "eac3", "alac")
# Video encoders in order of preference, with settings that look nearly lossless. B-frames are disabled (bf), because an MP4 stores
# the exact duration of the last frame only if frames are not reordered.
ENCODERS = {"libx264": {"crf": "18", "preset": "veryfast", "bf": "0"}, "mpeg4": {"qmin": "2", "qmax": "4"}}
SOUND_ENCODER = "aac"  # included in every FFmpeg build
SOUND_BITS = 96_000  # bits per second per channel
CLOCK = Fraction(1, 60_000)  # time base for re-encoded frames; MPEG-4 allows denominators up to 65,535
BT709 = 1  # FFmpeg's number for the primaries, transfer curve, and matrix of BT.709
LIMITED_RANGE = 1  # FFmpeg's number for limited color range, the usual one
REORDERED_S = 2.0  # maximum time by which a frame stored before a keyframe is displayed after the keyframe
REENCODE_HINT = "re-encode the clip instead: --exact, in Python exact=True"

# Packets with their decoding times, and frames (uint8 `[H, W, 3]`) with their display times. Times are in ascending order and in
# seconds from the beginning of the clip.
TimedPackets = Iterator[tuple[float, Packet]]
Pictures = Iterator[tuple[float, np.ndarray]]


class ClipReader:
    """Cuts a clip out of a video and returns its bytes in pieces. For the arguments, see `evoprune.video.clips.cut_clip`.

    Attributes:
        facts: A dict with "ending", the clip's file extension; "start_s", the clip's start time in seconds from the video's first
            frame; and "loses_sound", which is True if the video has audio but the clip does not.

    Raises:
        VideoError: The input is not a video file, or its packets cannot be copied. `fill` also raises this error if the file turns
            out to be damaged.
    """

    def __init__(self, info: Video, start_s: float, end_s: float, exact: bool, title: str):
        if reader_of(info) is not FILES:
            raise VideoError(f"cannot cut a clip from {info.path}: it is not a video file", "give a video file")
        self._path = info.path
        self._made = _MemoryFile()
        self._steps = _cut(info, start_s, end_s, exact, title, self._made)
        self._ended = False
        with ffmpeg.reading(info.path):
            self.facts = next(self._steps)

    def fill(self, content: np.ndarray) -> dict[str, int | bool]:
        """Fill `content` with the next bytes of the clip.

        Args:
            content: uint8 `[n]`.

        Returns:
            A dict with "at", the offset of the bytes in the clip's file; "bytes", the number of bytes written, at most n; and
            "done", which is True if these are the last bytes.
        """
        with ffmpeg.reading(self._path):
            while not self._ended and self._made.waiting < len(content):
                self._ended = next(self._steps, None) is None
        at, taken = self._made.take(len(content))
        content[: len(taken)] = np.frombuffer(taken, np.uint8)
        return {"at": at, "bytes": len(taken), "done": self._ended and not self._made.waiting}

    def close(self) -> None:
        self._steps.close()


class _MemoryFile:
    """An in-memory file object for FFmpeg's output. It stores the bytes and their offsets until `take` removes them."""

    def __init__(self):
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._at = 0
        self._size = 0
        self.waiting = 0  # number of bytes not removed yet

    def write(self, content: bytes) -> int:
        content = bytes(content)
        self._pieces.append((self._at, content))
        self.waiting += len(content)
        self._at += len(content)
        self._size = max(self._size, self._at)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def take(self, most: int) -> tuple[int, bytes]:
        """Remove up to `most` contiguous bytes, oldest first, and return them after their offset in the file."""
        at = self._pieces[0][0] if self._pieces else 0
        taken = bytearray()
        while self._pieces and len(taken) < most and self._pieces[0][0] == at + len(taken):
            place, content = self._pieces.popleft()
            fits = most - len(taken)
            taken += content[:fits]
            if len(content) > fits:
                self._pieces.appendleft((place + fits, content[fits:]))
        self.waiting -= len(taken)
        return at, bytes(taken)


def _cut(
    info: Video, start_s: float, end_s: float, exact: bool, title: str, file: _MemoryFile
) -> Iterator[dict[str, Any]]:
    """Write a clip to `file`. Yields the `facts` for `ClipReader` first, and then an empty dict after each packet."""
    joined = info.clock_restarts > 0
    if joined and not exact:
        raise VideoError(
            f"{info.path} consists of several joined files, so its packets cannot be copied", REENCODE_HINT
        )
    with closing(Track(info)) as track, ffmpeg.open_video(info.path) as container:
        audio = container.streams.best("audio")
        sound = audio
        if joined or (audio is not None and not _codec(audio)):
            sound = None
        copied: list[Stream] = []
        if sound is not None and not (exact and _codec(sound) not in IN_MP4):
            copied.append(sound)
        packets: Iterator[Packet | None] = iter(())
        if not exact:
            start_s, packets = _from_keyframe(track, start_s)
            copied.append(track.stream)
        ending = MP4 if all(_codec(stream) in IN_MP4 for stream in copied) else MATROSKA
        yield {"ending": ending, "start_s": start_s, "loses_sound": audio is not None and sound is None}
        origin_s = info.start_s + start_s
        length_s = end_s - start_s
        with _writing(info, exact), av.open(file, "w", format=FORMATS[ending]) as out:
            out.metadata["title"] = title
            if exact:
                video = _encoded(_encoder(out, info), _pictures(info, start_s, end_s), length_s)
            else:
                target = _add_copied_stream(out, track.stream)
                video = _copied(target, info.path, packets, origin_s, length_s, track.tolerance_s)
            audible: TimedPackets = iter(())
            if sound is not None:
                audible = _sound(out, info.path, sound, sound in copied, origin_s, length_s)
            for _, packet in merge(video, audible, key=itemgetter(0)):
                out.mux_one(packet)
                ffmpeg.alive()
                yield {}


@contextmanager
def _writing(info: Video, exact: bool) -> Iterator[None]:
    """Convert FFmpeg errors in a `with` block to VideoError. These are always write errors, because reading never raises them."""
    try:
        yield
    except (av.error.FFmpegError, ValueError) as error:
        hint = "convert it first, e.g. with ffmpeg" if exact else REENCODE_HINT
        raise VideoError(f"cannot cut a clip from {info.path}: {ffmpeg.reason(error)}", hint) from error


def _codec(stream: Stream) -> str:
    """Return FFmpeg's name for a stream's codec, or an empty string if FFmpeg has no decoder for it."""
    context = stream.codec_context
    return context.codec.canonical_name if context else ""


def _add_copied_stream(out: OutputContainer, stream: Stream) -> Stream:
    return out.add_stream_from_template(stream, opaque=True)  # an opaque stream needs no encoder


def _from_keyframe(track: Track, start_s: float) -> tuple[float, Iterator[Packet | None]]:
    """Find the last keyframe displayed at or before a given time.

    Returns:
        The keyframe's display time in seconds from the video's first frame, and the packets from that keyframe onward.

    Raises:
        VideoError: The packets have no timestamps, or no keyframe was found.
    """
    path = track.info.path
    timeless = VideoError(f"{path} has no display times for its packets, so they cannot be copied", REENCODE_HINT)
    if track.info.container == ffmpeg.AVI and track.stream.codec_context.has_b_frames:
        raise timeless

    def shown_s(packet: Packet) -> float:
        if packet.pts is None:
            raise timeless
        return packet.pts * float(packet.time_base) - track.info.start_s

    latest_s = start_s + track.tolerance_s
    try:
        keyframes = track.keyframes(start_s, start_s)
    except Unreachable:
        keyframes = []
    for keyframe in reversed(keyframes[: bisect_right(keyframes, latest_s, key=attrgetter("time_s"))]):
        with suppress(Unreachable):
            packets = track.packets(keyframe)
            first = next(packets)
            if shown_s(first) <= latest_s:  # checked again, because the index may contain decoding times
                return shown_s(first), chain([first], packets)
    place = None  # index of the keyframe among all packets, for files that FFmpeg cannot seek
    begin_s = 0.0
    for number, packet in enumerate(track.packets(None)):
        if packet is None or not packet.size:
            continue
        if shown_s(packet) > latest_s + REORDERED_S:
            break
        if packet.is_keyframe and shown_s(packet) <= latest_s:
            place = number
            begin_s = shown_s(packet)
    if place is None:
        raise VideoError(f"{path} has no keyframe at or before {start_s:g} s", REENCODE_HINT)
    return begin_s, islice(track.packets(None), place, None)


def _sound_packets(sound: Stream, origin_s: float) -> Iterator[Packet | None]:
    """Return an audio track's packets from about `origin_s` seconds onward, or all packets if the container is not seekable."""
    with suppress(av.error.FFmpegError):
        sound.container.seek(math.floor(origin_s / sound.time_base), stream=sound)
    return ffmpeg.packets(sound.container, sound)


def _sound(
    out: OutputContainer, path: str, sound: AudioStream, copied: bool, origin_s: float, length_s: float
) -> TimedPackets:
    """Add an audio stream to a clip and return its packets, re-encoded as AAC if `copied` is False or copying fails."""
    packets = _sound_packets(sound, origin_s)
    if copied:
        with suppress(ValueError):  # raised if the file format does not support the codec, such as WMA
            return _copied(_add_copied_stream(out, sound), path, packets, origin_s, length_s)
    rates = Codec(SOUND_ENCODER, "w").audio_rates or ()
    target = out.add_stream(SOUND_ENCODER, rate=sound.rate if sound.rate in rates else 48_000)
    target.layout = "mono" if sound.layout.nb_channels == 1 else "stereo"
    target.bit_rate = SOUND_BITS * target.layout.nb_channels
    return _encoded_sound(target, sound, packets, origin_s, length_s)


def _encoded_sound(
    target: AudioStream, sound: AudioStream, packets: Iterator[Packet | None], origin_s: float, length_s: float
) -> TimedPackets:
    """Re-encode a clip's audio and yield the resulting packets. Damaged packets are skipped."""
    part = Graph()
    ends = part.add_abuffer(template=sound), part.add("atrim", f"0:{length_s}"), part.add("abuffersink")
    part.link_nodes(*ends).configure()

    def encoded(frame: AudioFrame | None) -> TimedPackets:
        part.push(frame)  # None flushes the filter
        with suppress(BlockingIOError, EOFError):  # raised if the filter has no more output yet
            while True:
                yield from _ordered(target.encode(part.pull()))

    for packet in packets:
        try:
            frames = ffmpeg.decoded(sound.codec_context, packet)
        except av.error.FFmpegError:
            continue
        for frame in frames:
            if frame.pts is None:
                continue
            frame.pts -= round(origin_s / frame.time_base)
            if frame.pts * frame.time_base >= length_s:
                break
            yield from encoded(frame)
        else:
            continue
        break
    yield from encoded(None)
    yield from _ordered(target.encode(None))


def _ordered(packets: list[Packet]) -> TimedPackets:
    for packet in packets:
        yield float(packet.dts * packet.time_base), packet


def _copied(
    target: Stream,
    path: str,
    packets: Iterator[Packet | None],
    origin_s: float,
    length_s: float,
    tolerance_s: float = TOLERANCE_S,
) -> TimedPackets:
    """Yield the packets to copy to a clip, with times relative to the start of the clip.

    All packets decoded before the end of the clip are copied. Some of their frames may be displayed after the end, because a frame
    can depend on frames that are displayed later.

    Args:
        origin_s: Start time of the clip on the file's own clock, in seconds.
        length_s: Length of the clip in seconds.
        tolerance_s: See `Video.tolerance_s`.

    Raises:
        VideoError: The file is damaged, because its packets add up to more bytes than the file itself.
    """
    left = os.path.getsize(path)
    latest = None  # decoding time of the previous packet
    until_s = length_s  # end of the clip, or a later display time of a frame decoded before the end
    for packet in packets:
        if packet is None or not packet.size or packet.pts is None:
            continue
        shift = round(origin_s / packet.time_base)
        packet.pts -= shift
        if packet.dts is not None:
            packet.dts -= shift
        elif latest is None:
            packet.dts = packet.pts
        else:  # Matroska does not store decoding times
            packet.dts = latest + 1
        if latest is not None:
            packet.dts = max(packet.dts, latest + 1)
        shown_s = float(packet.pts * packet.time_base)
        decoded_s = float(packet.dts * packet.time_base)
        if decoded_s < length_s - tolerance_s:
            until_s = max(until_s, shown_s)
        elif decoded_s >= until_s - tolerance_s:
            return
        # Frames displayed before the clip begins depend on packets outside the clip.
        if not -tolerance_s <= shown_s <= until_s:
            continue
        latest = packet.dts
        left -= packet.size
        if left < 0:
            raise VideoError(f"{path} is damaged: its packets add up to more than its size", REENCODE_HINT)
        packet.stream = target
        yield decoded_s, packet


def _encoder(out: OutputContainer, info: Video) -> VideoStream:
    """Add a video encoder to a clip. If the height or width is odd, the last row or column is dropped."""
    name = next(name for name in ENCODERS if name in av.codecs_available)
    rate = Fraction(info.fps or ffmpeg.FALLBACK_FPS).limit_denominator(1001)
    stream = out.add_stream(name, rate=rate, options=ENCODERS[name])
    stream.width = info.width - info.width % 2
    stream.height = info.height - info.height % 2
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = CLOCK
    context.thread_count = ffmpeg.thread_count(Host().available_cores())
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED_RANGE
    ffmpeg.picture_size(info.width * info.height, 2)  # the encoder needs as much memory as a decoder
    return stream


def _encoded(stream: VideoStream, pictures: Pictures, length_s: float) -> TimedPackets:
    """Encode frames and yield their packets. Each frame lasts until the next frame begins, and the last frame until `length_s`."""
    colours = VideoReformatter()
    # Durations in ticks of the frames still in the encoder, keyed by display time.
    lengths: dict[int, int] = {}
    for (time_s, rgb), (end_s, _) in pairwise(chain(pictures, [(length_s, None)])):
        whole = np.ascontiguousarray(rgb[: stream.height, : stream.width])
        frame = VideoFrame.from_ndarray(whole, format="rgb24")
        frame = colours.reformat(frame, format=stream.pix_fmt, dst_colorspace=Colorspace.ITU709)
        frame.time_base = CLOCK
        frame.pts = round(time_s / CLOCK)
        lengths[frame.pts] = round(end_s / CLOCK) - frame.pts
        yield from _timed(stream.encode(frame), lengths)
    yield from _timed(stream.encode(None), lengths)


def _timed(packets: list[Packet], lengths: dict[int, int]) -> TimedPackets:
    for packet in packets:
        packet.duration = lengths.pop(packet.pts)
    yield from _ordered(packets)


def _pictures(info: Video, start_s: float, end_s: float) -> Pictures:
    """Yield the frame on screen at `start_s`, followed by all frames that appear before `end_s`.

    `start_s` and `end_s` are in seconds from the video's first frame, whereas the yielded times are in seconds from `start_s`.

    Raises:
        VideoError: No frame can be decoded.
    """

    def held() -> tuple[float, np.ndarray]:
        return max(0.0, shown_s - start_s), picture.of(shown_s, shown(), moved=False).rgb

    shown = None
    shown_s = -math.inf
    picture = Picture(info)
    tolerance_s = info.tolerance_s
    for time_s, frame in deinterlacing(_decoded(info, start_s)):
        # A frame's timestamp is wrong unless it is later than the previous frame's timestamp. No two frames share a tick.
        if time_s < shown_s + max(tolerance_s, CLOCK):
            continue
        if shown is not None and time_s >= end_s - tolerance_s:
            break
        if shown is not None and time_s > start_s + tolerance_s:
            yield held()
        shown = frame
        shown_s = time_s
    if shown is None:
        raise ffmpeg.nothing_decoded(info.path)
    yield held()


def _decoded(info: Video, start_s: float) -> Iterator[TimedFrame]:
    """Yield decoded frames, starting at a keyframe at or before `start_s` if possible; otherwise, at the beginning of the file."""
    with closing(Track(info, ffmpeg.thread_count(Host().available_cores()))) as track:
        (run,) = planned(track, [max(0.0, start_s)], "exact", 0.0)
        frames = None
        with suppress(Unreachable):
            _, frames = start_decoding(track, run, ffmpeg.ignore_damage, sparing=False)
        if frames is None:
            frames = track.from_beginning((), ffmpeg.ignore_damage)
        yield from frames
