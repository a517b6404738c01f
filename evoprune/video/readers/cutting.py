"""A part of a video as a file of its own: its packets copied from a keyframe on, or its frames re-encoded; with its sound.

Sound is copied too, and re-encoded if the clip's file format cannot hold it.

FFmpeg writes to memory, and `ClipReader.fill` hands the bytes out, each with its place in the file, because the end of an MP4 is
known before its beginning can be written. So the process that opens the video writes no file.
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

from evoprune.backend import available_cores
from evoprune.errors import VideoError
from evoprune.video.info import CLIP_ENDINGS, EXACT, PICTURE, Video
from evoprune.video.readers import ffmpeg, folder
from evoprune.video.readers.pyav import Picture, begun, planned
from evoprune.video.readers.track import TimedFrame, Track, Unreachable

MP4, MATROSKA = CLIP_ENDINGS
FORMATS = {MP4: "mp4", MATROSKA: "matroska"}
# What players expect in an MP4. A clip with anything else is a Matroska file.
IN_MP4 = ("h264", "hevc", "av1", "mpeg4", "aac", "mp3", "ac3", "eac3", "alac")
# The encoders, the preferred one first, with settings at which one hardly sees a difference. Without frames out of order (bf), an
# MP4 says exactly how long the last frame is shown.
ENCODERS = {"libx264": {"crf": "18", "preset": "veryfast", "bf": "0"}, "mpeg4": {"qmin": "2", "qmax": "4"}}
SOUND_ENCODER = "aac"  # part of every FFmpeg
SOUND_BITS = 96_000  # a second, for each channel
CLOCK = Fraction(1, 60_000)  # of re-encoded frames; MPEG-4 has no finer one
BT709 = 1  # FFmpeg's number of its primaries, curve and matrix
LIMITED_RANGE = 1  # FFmpeg's number of the usual range of brightness
REORDERED_S = 2.0  # a keyframe is not stored later than that behind frames that are shown after it
EXACTLY = "cut it exactly, which re-encodes it: --exact, in Python exact=True"

# When each is decoded, or shown, in seconds from the clip's beginning, ascending. Pictures are uint8 `[H, W, 3]`.
TimedPackets = Iterator[tuple[float, Packet]]
Pictures = Iterator[tuple[float, np.ndarray]]


class ClipReader:
    """Make a clip and hand out its bytes; arguments as of `evoprune.moments.clips.cut_clip`.

    `facts`: the "ending" of its name, "start_s", where it begins in the video, in seconds from the first frame, and
    "loses_sound", True if the video has sound and the clip has none.

    Raises VideoError: no video file, or one whose packets cannot be copied. So does `fill`, where the file is found to be damaged.
    """

    def __init__(self, info: Video, start_s: float, end_s: float, exact: bool, title: str):
        if info.kind == PICTURE or info.container == folder.CONTAINER:
            raise VideoError(f"{info.path} is no video file, of which a clip could be cut", "give a video file")
        self._path = info.path
        self._made = _Written()
        self._steps = _cut(info, start_s, end_s, exact, title, self._made)
        self._ended = False
        with ffmpeg.reading(info.path):
            self.facts = next(self._steps)

    def fill(self, content: np.ndarray) -> dict[str, int | bool]:
        """Write the next bytes into uint8 `[n]`; return how many, their place in the file, and whether they are the last ones."""
        with ffmpeg.reading(self._path):
            while not self._ended and self._made.waiting < len(content):
                self._ended = next(self._steps, None) is None
        at, taken = self._made.take(len(content))
        content[: len(taken)] = np.frombuffer(taken, np.uint8)
        return {"at": at, "bytes": len(taken), "done": self._ended and not self._made.waiting}

    def close(self) -> None:
        self._steps.close()


class _Written:
    """Stand in for the file that FFmpeg writes: hold what was written and not taken yet, each piece with its place."""

    def __init__(self):
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._at = 0
        self._size = 0
        self.waiting = 0  # bytes

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
        """Return the place of the next bytes, and as many as follow one another there, at most so many."""
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
    info: Video, start_s: float, end_s: float, exact: bool, title: str, file: _Written
) -> Iterator[dict[str, Any]]:
    """Write a clip into a file: yield the facts, and then something after each packet."""
    joined = info.clock_restarts > 0
    if joined and not exact:
        raise VideoError(f"{info.path} was joined of several files, so its packets cannot be copied", EXACTLY)
    with closing(Track(info)) as track, ffmpeg.open_video(info.path) as beside:
        heard = beside.streams.best("audio")
        sound = heard
        if joined or (heard is not None and not _codec(heard)):
            sound = None
        copied: list[Stream] = []
        if sound is not None and not (exact and _codec(sound) not in IN_MP4):
            copied.append(sound)
        packets: Iterator[Packet | None] = iter(())
        if not exact:
            start_s, packets = _from_keyframe(track, start_s)
            copied.append(track.stream)
        ending = MP4 if all(_codec(stream) in IN_MP4 for stream in copied) else MATROSKA
        yield {"ending": ending, "start_s": start_s, "loses_sound": heard is not None and sound is None}
        origin_s = info.start_s + start_s
        length_s = end_s - start_s
        with _writing(info, exact), av.open(file, "w", format=FORMATS[ending]) as out:
            out.metadata["title"] = title
            if exact:
                video = _encoded(_encoder(out, info), _pictures(info, start_s, end_s), length_s)
            else:
                video = _copied(_like(out, track.stream), info.path, packets, origin_s, length_s)
            audible: TimedPackets = iter(())
            if sound is not None:
                audible = _sound(out, info.path, sound, sound in copied, origin_s, length_s)
            for _, packet in merge(video, audible, key=itemgetter(0)):
                out.mux_one(packet)
                ffmpeg.alive()
                yield {}


@contextmanager
def _writing(info: Video, exact: bool) -> Iterator[None]:
    """Turn what FFmpeg raises where it writes into VideoError: there what is read raises nothing."""
    try:
        yield
    except (av.error.FFmpegError, ValueError) as error:
        hint = "convert it first, e.g. with ffmpeg" if exact else EXACTLY
        raise VideoError(f"cannot make a clip of {info.path}: {ffmpeg.reason(error)}", hint) from error


def _codec(stream: Stream) -> str:
    """Return FFmpeg's name of a codec; empty where there is no decoder for it."""
    context = stream.codec_context
    return context.codec.canonical_name if context else ""


def _like(out: OutputContainer, stream: Stream) -> Stream:
    """Add a stream for packets of another."""
    return out.add_stream_from_template(stream, opaque=True)  # which needs no encoder


def _from_keyframe(track: Track, start_s: float) -> tuple[float, Iterator[Packet | None]]:
    """Return when the last keyframe is shown that is not shown after a time, and the packets from there on.

    Raises VideoError: packets have no times, or there is no such keyframe.
    """
    path = track.info.path
    timeless = VideoError(f"{path} does not say when its packets are shown, so they cannot be copied", EXACTLY)
    if track.info.container == ffmpeg.AVI and track.stream.codec_context.has_b_frames:
        raise timeless

    def shown_s(packet: Packet) -> float:
        """Return when a packet is shown, in seconds from the video's first frame."""
        if packet.pts is None:
            raise timeless
        return packet.pts * float(packet.time_base) - track.info.start_s

    latest_s = start_s + ffmpeg.TOLERANCE_S
    try:
        keyframes = track.keyframes(start_s, start_s)
    except Unreachable:
        keyframes = []
    for keyframe in reversed(keyframes[: bisect_right(keyframes, latest_s, key=attrgetter("time_s"))]):
        with suppress(Unreachable):
            packets = track.packets(keyframe)
            first = next(packets)
            if shown_s(first) <= latest_s:  # the index may have decoding times
                return shown_s(first), chain([first], packets)
    place = None  # of its packet, where there is no index
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
        raise VideoError(f"{path} has no keyframe at {start_s:g} s or before", EXACTLY)
    return begin_s, islice(track.packets(None), place, None)


def _heard(sound: Stream, origin_s: float) -> Iterator[Packet | None]:
    """Return the packets of a sound from about a time of the file's clock on, or from its beginning."""
    with suppress(av.error.FFmpegError):  # a container that does not seek
        sound.container.seek(math.floor(origin_s / sound.time_base), stream=sound)
    return ffmpeg.packets(sound.container, sound)


def _sound(
    out: OutputContainer, path: str, sound: AudioStream, copied: bool, origin_s: float, length_s: float
) -> TimedPackets:
    """Add a stream for the sound of a clip and return its packets: copied if asked for and the format holds them, else AAC."""
    packets = _heard(sound, origin_s)
    if copied:
        with suppress(ValueError):  # the format does not hold the codec, such as WMA
            return _copied(_like(out, sound), path, packets, origin_s, length_s)
    rates = Codec(SOUND_ENCODER, "w").audio_rates or ()
    target = out.add_stream(SOUND_ENCODER, rate=sound.rate if sound.rate in rates else 48_000)
    target.layout = "mono" if sound.layout.nb_channels == 1 else "stereo"
    target.bit_rate = SOUND_BITS * target.layout.nb_channels
    return _encoded_sound(target, sound, packets, origin_s, length_s)


def _encoded_sound(
    target: AudioStream, sound: AudioStream, packets: Iterator[Packet | None], origin_s: float, length_s: float
) -> TimedPackets:
    """Yield the packets of the sound between the beginning and the end of a clip, re-encoded; damaged packets are skipped."""
    part = Graph()
    ends = part.add_abuffer(template=sound), part.add("atrim", f"0:{length_s}"), part.add("abuffersink")
    part.link_nodes(*ends).configure()

    def encoded(frame: AudioFrame | None) -> TimedPackets:
        """Yield the packets that are complete after a frame; None for the end."""
        part.push(frame)
        with suppress(BlockingIOError, EOFError):  # there is nothing more yet
            while True:
                yield from _ordered(target.encode(part.pull()))

    for packet in packets:
        try:
            frames = sound.decode(packet)
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
    target: Stream, path: str, packets: Iterator[Packet | None], origin_s: float, length_s: float
) -> TimedPackets:
    """Yield the packets that are decoded before the end of a clip, as frames need others that are shown after them.

    `origin_s`: where the clip begins by the file's clock.
    """
    left = os.path.getsize(path)
    latest = None  # when the packet before is decoded
    until_s = length_s  # the end, or later, where a frame has to be decoded earlier than it is shown
    for packet in packets:
        if packet is None or not packet.size or packet.pts is None:
            continue
        shift = round(origin_s / packet.time_base)
        packet.pts -= shift
        if packet.dts is not None:
            packet.dts -= shift
        elif latest is None:
            packet.dts = packet.pts
        else:  # of the next packets in a Matroska file
            packet.dts = latest + 1
        if latest is not None:
            packet.dts = max(packet.dts, latest + 1)
        shown_s = float(packet.pts * packet.time_base)
        decoded_s = float(packet.dts * packet.time_base)
        if decoded_s < length_s - ffmpeg.TOLERANCE_S:
            until_s = max(until_s, shown_s)
        elif decoded_s >= until_s - ffmpeg.TOLERANCE_S:
            return
        if not -ffmpeg.TOLERANCE_S <= shown_s <= until_s:  # before the beginning, it needs what is not there
            continue
        latest = packet.dts
        left -= packet.size
        if left < 0:
            raise VideoError(f"{path} is damaged: it lists more than it holds", EXACTLY)
        packet.stream = target
        yield decoded_s, packet


def _encoder(out: OutputContainer, info: Video) -> VideoStream:
    """Add a stream that encodes pictures of a video, without the last row or column where their number is odd."""
    name = next(name for name in ENCODERS if name in av.codecs_available)
    rate = Fraction(info.fps or ffmpeg.FALLBACK_FPS).limit_denominator(1001)
    stream = out.add_stream(name, rate=rate, options=ENCODERS[name])
    stream.width = info.width - info.width % 2
    stream.height = info.height - info.height % 2
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = CLOCK
    context.thread_count = ffmpeg.thread_count(available_cores())
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED_RANGE
    if info.pixel_aspect:
        aspect = Fraction(info.pixel_aspect).limit_denominator(1000)
        context.sample_aspect_ratio = aspect if info.rotation_deg % 180 == 0 else 1 / aspect
    ffmpeg.picture_size(info.width * info.height, 2)  # it holds as much as a decoder
    return stream


def _encoded(stream: VideoStream, pictures: Pictures, length_s: float) -> TimedPackets:
    """Yield the packets of pictures, each of which is shown until the next one, the last one until the end."""
    colours = VideoReformatter()
    lengths: dict[int, int] = {}  # of pictures whose packets are still to come, by their times
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
    """Yield the picture that is shown at a time, and then each that appears before another time.

    Raises VideoError: nothing can be decoded.
    """

    def held() -> tuple[float, np.ndarray]:
        return max(0.0, shown_s - start_s), picture.of(shown_s, shown, moved=False).rgb

    shown = None
    shown_s = -math.inf
    picture = Picture(info)
    for time_s, frame in _decoded(info, start_s):
        if time_s < shown_s + ffmpeg.TOLERANCE_S:  # its time lies
            continue
        if shown is not None and time_s >= end_s - ffmpeg.TOLERANCE_S:
            break
        if shown is not None and time_s > start_s + ffmpeg.TOLERANCE_S:
            yield held()
        shown = frame
        shown_s = time_s
    if shown is None:
        raise ffmpeg.nothing_decoded(info.path)
    yield held()


def _decoded(info: Video, start_s: float) -> Iterator[TimedFrame]:
    """Yield the frames from a keyframe before a time on."""
    (run,) = planned(info, [max(0.0, start_s)], EXACT, 0.0)
    with closing(Track(info, ffmpeg.thread_count(available_cores()))) as track:
        frames = None
        with suppress(Unreachable):
            _, frames = begun(track, run, ffmpeg.ignore_damage, sparing=False)
        if frames is None:
            frames = track.from_beginning((), ffmpeg.ignore_damage)
        yield from frames
