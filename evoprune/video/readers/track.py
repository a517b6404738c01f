"""A video file, open, with a decoder of its own: its keyframes, and its frames from a place on."""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, pairwise

import av
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from evoprune.video.info import Video
from evoprune.video.readers import ffmpeg

TimedFrame = tuple[float, VideoFrame]  # seconds from the first frame; the decoder's own pixels, not yet rotated

# Containers that store the time of each frame, so that times are the same after a jump; others are read front to back.
SEEKABLE = (ffmpeg.MOV, ffmpeg.MATROSKA, "mpegts")
# Codecs in which a frame says whether others depend on it. AV1's decoder can leave such frames out as well, but not exactly.
SPARING = ("h264", "hevc")
LOOK_AHEAD = 64  # packets, among which the frame is that is shown next: no codec here reorders more than 16
LOOK_AHEAD_BYTES = 2**25
FIRST = 8  # frames of which none is left out, which show whether they are in the order of their times
BACK_S = (
    0.0,
    4.0,
    16.0,
)  # a seek may end behind a keyframe (MPEG-TS has no index): then it is repeated, so much earlier


class Unreachable(Exception):
    """Say that a time cannot be decoded from a keyframe on: the file has to be, from its beginning."""


@dataclass(frozen=True, order=True)
class Keyframe:
    """Describe a packet that says that it is a keyframe. `time_s` is wrong by a few frames where an index has decoding times."""

    time_s: float  # from the first frame
    stamp: int  # by which the packet is recognised, in units of the stream's clock


class Track:
    """Decode a file, for one thread. To be closed. `threads`: of the decoder."""

    def __init__(self, info: Video, threads: int = 1):
        self.info = info
        self._threads = threads
        self._files = ExitStack()
        self._open()

    def _open(self) -> None:
        self._container = self._files.enter_context(ffmpeg.open_video(self.info.path))
        try:
            self._stream = ffmpeg.video_stream(self._container, self.info.path, threads=self._threads)
        except BaseException:
            self.close()
            raise
        self._at_beginning = True

    def close(self) -> None:
        self._files.close()

    def keyframes(self, start_s: float, end_s: float) -> list[Keyframe]:
        """List the keyframes between two times, and one or more before them, by the index if it is complete, else by all packets.

        None where the container does not seek, its clock restarts, or packets have no times or not in their order.
        """
        if not self._has_times:
            return []
        tick = float(self._stream.time_base)
        if self.info.container == ffmpeg.MATROSKA:
            self._seek(end_s)  # which reads the index
        entries = self._stream.index_entries
        listed = self.info.container == ffmpeg.MATROSKA and len(entries)
        if listed or (self.info.container == ffmpeg.MOV and len(entries) == self._stream.frames > 0):
            first = next((entry.timestamp for entry in entries if not entry.is_discard), entries[0].timestamp)
            # In MP4 the first frame's decoding time; what it is shown later by, nearly all are.
            begin_s = first * tick if self.info.container == ffmpeg.MOV else self.info.start_s
            stamps = [entry.timestamp for entry in entries]
            if any(later <= earlier for earlier, later in pairwise(stamps)):
                return []  # it lies: what comes first is not known
            return [Keyframe(e.timestamp * tick - begin_s, e.timestamp) for e in entries if e.is_keyframe]
        if start_s > BACK_S[-1]:
            self._seek(start_s - BACK_S[-1])
        found = []
        for packet in self._packets():
            if packet is None or packet.pts is None or packet.dts is None:
                continue
            if packet.dts * tick - self.info.start_s > end_s:
                break
            if packet.is_keyframe and packet.size:
                found.append(Keyframe(packet.pts * tick - self.info.start_s, self._stamp(packet)))
        return sorted(found)

    def times(self) -> list[float] | None:
        """Return the time of every frame, ascending, without decoding; None where packets do not tell."""
        if not self._has_times:
            return None
        packets = self._packets()
        stamps = [packet.pts for packet in packets if packet is not None and packet.size and not packet.is_discard]
        if None in stamps or len(set(stamps)) < len(stamps):
            return None
        tick = float(self._stream.time_base)
        times = sorted(stamp * tick - self.info.start_s for stamp in stamps)
        # Frames before the first one that can be decoded lack those that they were predicted from.
        return times[bisect_left(times, -ffmpeg.TOLERANCE_S) :]

    def from_beginning(
        self, times_s: Sequence[float], damaged: ffmpeg.Damage, *, sparing: bool = False
    ) -> Iterator[TimedFrame]:
        """Return all frames; with `sparing` as of `from_keyframe`."""
        self._rewind()
        packets = self._packets(damaged)
        if sparing:
            packets = self._spared(
                packets, [max(0.0, time) for time in times_s]
            )  # the first one is shown before it begins
        return self._decoded(packets, damaged)

    def from_keyframe(
        self, keyframe: Keyframe, times_s: Sequence[float], damaged: ffmpeg.Damage, *, sparing: bool
    ) -> Iterator[TimedFrame] | None:
        """Return the frames from a keyframe on, which is shown at the first of some times or before; None if none there is.

        `sparing`: frames that are shown at none of the times, and on which no other depends, may be missing.
        """

        def note(mark: object) -> None:
            if landed:
                damaged(mark)

        landed = False
        latest = -math.inf
        packets = self._from(keyframe, note)
        if sparing:
            packets = self._spared(packets, times_s)
        frames = self._decoded(packets, note)
        for time, frame in frames:
            if time > times_s[0] + ffmpeg.TOLERANCE_S:
                break
            # Before the first true keyframe, frames may lack the frames that they were predicted from.
            if _is_whole(frame):
                landed = time > latest
                if not landed:
                    return None
                return chain([(time, frame)], frames)
            latest = max(latest, time)
        return None

    def packets(self, keyframe: Keyframe | None) -> Iterator[Packet | None]:
        """Return the packets from a keyframe on, or all of them, as `ffmpeg.packets`. Raises Unreachable."""
        if keyframe is not None:
            return self._from(keyframe, ffmpeg.ignore_damage)
        self._rewind()
        return self._packets()

    def alone(self, keyframe: Keyframe) -> TimedFrame | None:
        """Return the frame of a keyframe, decoded by itself; None if it cannot be."""
        decode = ffmpeg.decoder(self._stream, self.info.crop)
        frames: list[VideoFrame] = []
        try:
            for packet in self._from(keyframe, ffmpeg.ignore_damage):
                frames = decode(packet)
                if frames or not self.info.interlaced:  # where a packet may be half a frame
                    break
            frames = frames or decode(None)
        except (av.error.FFmpegError, Unreachable):
            return None
        if not frames:
            return None
        stamp = ffmpeg.frame_time(frames[0], self._stream)
        if stamp is None or not _is_whole(frames[0]):
            return None
        return stamp - self.info.start_s, frames[0]

    def can_spare(self) -> bool:
        """Return whether frames can be left out, by their times, with the others staying the same.

        In HEVC a frame on which no other of its layer depends may be needed by those of higher layers; the header counts them.
        Interlaced frames may be stored in two packets.
        """
        context = self._stream.codec_context
        name = context.codec.canonical_name
        if name == "hevc":
            header = bytes(context.extradata or b"")
            if len(header) < 23 or header[0] != 1 or header[21] >> 3 & 7 != 1:
                return False
        progressive = not self.info.interlaced and context.field_order <= 1
        return name in SPARING and self._has_times and progressive

    @property
    def stream(self) -> VideoStream:
        return self._stream

    @property
    def _has_times(self) -> bool:
        return self.info.container in SEEKABLE and not self.info.clock_restarts and self._stream.start_time is not None

    def _rewind(self) -> None:
        if not self._at_beginning:
            self.close()
            self._open()

    def _packets(self, damaged: ffmpeg.Damage = ffmpeg.ignore_damage) -> Iterator[Packet | None]:
        self._at_beginning = False
        return ffmpeg.packets(self._container, self._stream, damaged)

    def _stamp(self, packet: Packet) -> int | None:
        """Return the time by which a packet is known: in Matroska, which has no decoding times, of display."""
        return packet.pts if self.info.container == ffmpeg.MATROSKA else packet.dts

    def _seek(self, time_s: float) -> None:
        """Raises Unreachable."""
        self._at_beginning = False
        try:
            self._container.seek(math.floor((time_s + self.info.start_s) / self._stream.time_base), stream=self._stream)
        except (av.error.FFmpegError, OverflowError) as error:
            raise Unreachable from error

    def _from(self, keyframe: Keyframe, damaged: ffmpeg.Damage) -> Iterator[Packet | None]:
        """Return the packets from a keyframe on. Raises Unreachable."""
        for back_s in BACK_S:
            self._seek(keyframe.time_s + ffmpeg.TOLERANCE_S - back_s)
            packets = self._packets(damaged)
            for packet in packets:
                stamp = None if packet is None else self._stamp(packet)
                if stamp is None or not packet.is_keyframe:
                    continue
                if stamp == keyframe.stamp:
                    return chain([packet], packets)
                if stamp > keyframe.stamp:
                    break
        raise Unreachable

    def _spared(self, packets: Iterator[Packet | None], times_s: Sequence[float]) -> Iterator[Packet | None]:
        """Yield the same packets, each with the decoder told before whether its frame may be left out."""
        context = self._stream.codec_context
        tick = float(self._stream.time_base)
        ahead: deque[Packet | None] = deque()
        shown: list[float] = []  # times at which frames near by are shown, ascending
        ends = False
        held = 0
        count = 0

        def time_of(packet: Packet | None) -> float | None:
            if packet is None or packet.pts is None or packet.is_discard:
                return None
            return packet.pts * tick

        def bytes_of(packet: Packet | None) -> int:
            return 0 if packet is None else packet.size

        begin_s = self.info.start_s
        try:
            while True:
                while not ends and len(ahead) < LOOK_AHEAD and held < LOOK_AHEAD_BYTES:
                    packet = next(packets, False)
                    if packet is False:
                        ends = True
                        break
                    ahead.append(packet)
                    held += bytes_of(packet)
                    if (time := time_of(packet)) is not None:
                        insort(shown, time - begin_s)
                if not ahead:
                    return
                packet = ahead.popleft()
                held -= bytes_of(packet)
                time = time_of(packet)
                needed = count < FIRST or time is None or _is_wanted(time - begin_s, shown, times_s)
                context.skip_frame = "DEFAULT" if needed else "NONREF"
                yield packet
                count += 1
                del shown[: max(0, len(shown) - 2 * LOOK_AHEAD)]
        finally:
            context.skip_frame = "DEFAULT"

    def _decoded(self, packets: Iterator[Packet | None], damaged: ffmpeg.Damage) -> Iterator[TimedFrame]:
        """Frames with their times: where the file states none, one step after the frame before.

        So is the first frame after a restart of the file's clock, from where on times are counted.
        """
        info = self.info
        step = 1 / (info.fps or ffmpeg.FALLBACK_FPS)
        time = -step
        origin = info.start_s
        for frame in ffmpeg.decoded_frames(self._stream, packets, damaged, info.crop):
            stamp = ffmpeg.frame_time(frame, self._stream)
            if stamp is not None and info.clock_restarts and ffmpeg.restarts(stamp - origin - time, info.container):
                origin = stamp - time - step
            if stamp is None:
                time += step
            else:
                time = stamp - origin
            yield time, frame


def _is_whole(frame: VideoFrame) -> bool:
    """Return whether a frame depends on no other, and is undamaged: what is marked as a keyframe may only begin a gradual
    refresh.
    """
    return bool(frame.key_frame) and frame.pict_type == PictureType.I and not frame.is_corrupt


def _is_wanted(time_s: float, shown_s: Sequence[float], times_s: Sequence[float]) -> bool:
    """Return whether the frame of that time is on screen at one of `times_s`; `shown_s`: the times of frames near by, ascending."""
    following = bisect_right(shown_s, time_s)
    ends_s = shown_s[following] if following < len(shown_s) else math.inf
    first = bisect_left(times_s, time_s - ffmpeg.TOLERANCE_S)
    return first < len(times_s) and times_s[first] + ffmpeg.TOLERANCE_S < ends_s
