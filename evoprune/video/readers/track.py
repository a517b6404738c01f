"""Provides `Track`, an open video file that lists its keyframes and decodes from the beginning or from a keyframe."""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from operator import attrgetter
from typing import Any

import av
from av.index import IndexEntries
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from evoprune.files import FileIdentity
from evoprune.video.info import Video
from evoprune.video.readers import ffmpeg
from evoprune.video.readers.clock import WITH_DECODING_TIMES, Clock, longest_gap_s

TimedFrame = tuple[float, VideoFrame]  # timestamp in seconds from the first frame, and unrotated frame

# Containers with a timestamp for every frame, so that times are correct after a seek. All other containers are read sequentially.
SEEKABLE = (ffmpeg.MOV, ffmpeg.MATROSKA, "mpegts")
# Codecs with frames that indicate whether other frames depend on them. AV1 is not included, because its decoder cannot skip exactly
# the frames on which no other frame depends.
SPARING = ("h264", "hevc")
# Number of packets to search for the next displayed frame. The codecs in `SPARING` reorder at most 16 frames.
LOOK_AHEAD = 64
LOOK_AHEAD_BYTES = 2**25
FIRST = 8  # number of initial frames that are never skipped, to check that frames arrive in timestamp order
# A seek may land after the keyframe, because MPEG-TS has no index. The seek is then retried this many seconds earlier.
BACK_S = (0.0, 4.0, 16.0)
# Memory per decoder and frame pixel: 16 reference frames and a few others, at up to 3 bytes per pixel.
DECODER_BYTES = 64
ENTRY_BYTES = 64  # FFmpeg's memory per packet listed in an index
# Maximum number of keyframes at which to try to start decoding, because an index may also list non-keyframes.
MAX_ENTRIES = 3
MOST_CHECKED = 64  # maximum number of files in `_ascending`

_ascending: dict[FileIdentity, bool] = {}  # whether the timestamps in each file's index are ascending


class Unreachable(Exception):
    """Raised if decoding cannot start at a keyframe, so the file must be decoded from the beginning."""


@dataclass(frozen=True, order=True)
class Keyframe:
    """A packet marked as a keyframe. `time_s` is off by a few frames if the file's index contains decoding times."""

    time_s: float  # time in seconds from the first frame
    stamp: int  # timestamp that identifies the packet (see `Track._stamp`), in ticks of the stream's clock


class _Stamps(Sequence[int]):
    """The timestamps in an index. Reading an entry takes a microsecond, so a long file's index is not read as a whole."""

    def __init__(self, entries: IndexEntries):
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, place: int) -> int:
        return self._entries[place].timestamp

    def is_keyframe(self, place: int) -> bool:
        return self._entries[place].is_keyframe


class Track:
    """An open video file with its own decoder, for use by a single thread. Callers must close it.

    Args:
        threads: Number of decoder threads.

    Attributes:
        tolerance_s: See `Video.tolerance_s`.
        identity: The file's identity, or None if a later change of the file might go unnoticed.
        playhead: Set and used by the caller. It is reset to None if decoding starts elsewhere.
    """

    def __init__(self, info: Video, threads: int = 1):
        self.info = info
        self.tolerance_s = info.tolerance_s
        self._threads = threads
        self._files = ExitStack()
        self._open()

    def _open(self) -> None:
        identity = FileIdentity.settled(self.info.path)
        self._container = self._files.enter_context(ffmpeg.open_video(self.info.path))
        try:
            self._stream = ffmpeg.video_stream(self._container, self.info.path, threads=self._threads)
        except BaseException:
            self.close()
            raise
        self._at_beginning = True
        self._has_decoded = False
        self._is_damaged = False
        self._indexed: list[int] | None = None  # see `_indexed_in_matroska`
        self.playhead: Any = None
        if identity is not None and FileIdentity.settled(self.info.path) != identity:
            identity = None  # the file was replaced in the meantime
        self.identity = identity

    def can_use(self, threads: int) -> bool:
        """Return True if `use_threads` can be called with this number of threads."""
        return threads == self._threads or not self._has_decoded

    def use_threads(self, threads: int) -> None:
        """Change the number of decoder threads. The number cannot be changed once anything has been decoded."""
        if threads != self._threads:
            self._threads = threads
            ffmpeg.use_threads(self._stream, threads)

    def stop_skipping(self) -> None:
        """Decode all frames again, even if an iterator from `from_keyframe` or `from_beginning` was abandoned."""
        self._stream.codec_context.skip_frame = "DEFAULT"

    def close(self) -> None:
        self.playhead = None
        self._files.close()

    @property
    def is_worth_keeping(self) -> bool:
        """True if reading other frames from this track later is faster than opening the file again, with the same result."""
        if self._has_index and self._is_seekable:
            return not self._is_damaged  # a decoder may treat later frames differently after damage
        return self.playhead is not None and not self._is_seekable

    @property
    def memory_bytes(self) -> int:
        """Estimated memory usage."""
        return DECODER_BYTES * self.info.width * self.info.height + ENTRY_BYTES * len(self._stream.index_entries)

    def keyframes(self, start_s: float, end_s: float) -> list[Keyframe]:
        """List the keyframes between two times, plus at least one keyframe before the start time.

        The keyframes are taken from the file's index if it is complete, along with the next keyframe after the end time and the
        last `MAX_ENTRIES` keyframes at or before the start time. Otherwise, the packets have to be read.

        Returns:
            The keyframes in ascending order. The list is empty if the container is not seekable, the file's clock restarts, packets
            have no timestamps, or the index timestamps are not in ascending order.

        Raises:
            Unreachable: Seeking failed.
        """
        if not self._is_seekable:
            return []
        tick = float(self._stream.time_base)
        if self.info.container == ffmpeg.MATROSKA:
            stamps = self._indexed_in_matroska(end_s)
            if stamps:
                return self._around(stamps, start_s, end_s, self.info.start_s)
        elif self._has_index:
            entries = self._stream.index_entries
            if not self._is_ascending():
                return []  # the index is wrong, so the frame order is unknown
            first = next((entry.timestamp for entry in entries if not entry.is_discard), entries[0].timestamp)
            # This is the first frame's decoding time. Nearly all frames are displayed with the same delay.
            return self._around(_Stamps(entries), start_s, end_s, first * tick)
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

    def _indexed_in_matroska(self, end_s: float) -> list[int]:
        """Return the timestamps in a Matroska file's index, followed by all later keyframes up to a time.

        FFmpeg adds every keyframe that it reads to its own index. These keyframes are left out unless they are after the file's
        index, so that the result does not depend on what has been read before.
        """
        entries = self._stream.index_entries
        if self._indexed is None:
            self._seek(0.0)  # makes FFmpeg read the index
            self._indexed = [entry.timestamp for entry in entries]
        if self._indexed and self._indexed[-1] * float(self._stream.time_base) - self.info.start_s <= end_s:
            self._seek(end_s)  # reads the keyframes up to this time
            place = bisect_right(entries, self._indexed[-1], key=attrgetter("timestamp"))
            self._indexed += [entry.timestamp for entry in entries[place:]]
        return self._indexed

    def _around(
        self, stamps: "Sequence[int] | _Stamps", start_s: float, end_s: float, begin_s: float
    ) -> list[Keyframe]:
        """Return the keyframes to list (see `keyframes`) from an index.

        Args:
            stamps: All timestamps in the index in ascending order, in ticks.
            begin_s: Time to subtract from the timestamps, in seconds.
        """
        tick = float(self._stream.time_base)

        def keyframe(place: int) -> Keyframe:
            return Keyframe(stamps[place] * tick - begin_s, stamps[place])

        is_keyframe = stamps.is_keyframe if isinstance(stamps, _Stamps) else lambda place: True
        middle = bisect_right(stamps, start_s + self.tolerance_s, key=lambda stamp: stamp * tick - begin_s)
        before = islice(filter(is_keyframe, reversed(range(middle))), MAX_ENTRIES)
        found = [keyframe(place) for place in before][::-1]
        for place in filter(is_keyframe, range(middle, len(stamps))):
            found.append(keyframe(place))
            if found[-1].time_s > end_s + self.tolerance_s:
                break
        return found

    def _is_ascending(self) -> bool:
        """Return True if each timestamp in the index is later than the one before it. Checked only once for each file."""
        if (known := _ascending.get(self.identity)) is not None:
            return known
        stamps = (entry.timestamp for entry in self._stream.index_entries)
        ascending = all(earlier < later for earlier, later in pairwise(stamps))
        if self.identity is not None:
            if len(_ascending) >= MOST_CHECKED:
                _ascending.clear()
            _ascending[self.identity] = ascending
        return ascending

    def times(self) -> list[float] | None:
        """Return all frame timestamps in ascending order, without decoding, or None if timestamps are missing or duplicated."""
        if not self._has_times:
            return None
        packets = self._packets()
        stamps = [packet.pts for packet in packets if packet is not None and packet.size and not packet.is_discard]
        if None in stamps or len(set(stamps)) < len(stamps):
            return None
        tick = float(self._stream.time_base)
        times = sorted(stamp * tick - self.info.start_s for stamp in stamps)
        # Omit frames before the first decodable frame, because they depend on missing frames.
        return times[bisect_left(times, -self.tolerance_s) :]

    def from_beginning(
        self, times_s: Sequence[float], damaged: ffmpeg.Damage, *, sparing: bool = False
    ) -> Iterator[TimedFrame]:
        """Decode the file from the beginning. For `times_s` and `sparing`, see `from_keyframe`."""
        self._rewind()
        packets = self._packets(damaged)
        if sparing:
            # A time before the start of the video requires the first frame.
            packets = self._spared(packets, [max(0.0, time) for time in times_s])
        return self._decoded(packets, damaged)

    def from_keyframe(
        self, keyframe: Keyframe, times_s: Sequence[float], damaged: ffmpeg.Damage, *, sparing: bool
    ) -> Iterator[TimedFrame] | None:
        """Decode frames from a keyframe onward. Returns None if no intact keyframe is displayed by the first requested time.

        Args:
            times_s: Requested times in seconds from the first frame, in ascending order.
            damaged: Callback for damaged data. It is called only for damage after the keyframe at which decoding starts.
            sparing: If True, the decoder may skip frames that are not on screen at any requested time and on which no other frame
                depends.

        Raises:
            Unreachable: FFmpeg cannot seek to the keyframe.
        """

        def note(mark: object) -> None:
            if landed:
                damaged(mark)

        landed = False
        latest = -math.inf
        packets = self._from(keyframe, note)
        if sparing:
            packets = self._spared(packets, times_s)
        frames = self._in_order(self._decoded(packets, note))
        for time, frame in frames:
            if time > times_s[0] + self.tolerance_s:
                break
            # Frames before the first real keyframe may depend on missing frames.
            if _is_whole(frame):
                landed = time > latest
                if not landed:
                    return None
                return chain([(time, frame)], frames)
            latest = max(latest, time)
        return None

    def _in_order(self, frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
        """Yield frames unchanged. Raises `Unreachable` if the frames of an AVI turn out to be reordered."""
        for found in frames:
            if self.info.container == ffmpeg.AVI and self._reorders:
                raise Unreachable
            yield found

    def packets(self, keyframe: Keyframe | None) -> Iterator[Packet | None]:
        """Return the packets from a keyframe onward, or all packets if None is given. Raises `Unreachable` if seeking fails."""
        if keyframe is not None:
            return self._from(keyframe, ffmpeg.ignore_damage)
        self._rewind()
        return self._packets()

    def alone(self, keyframe: Keyframe) -> TimedFrame | None:
        """Decode a single keyframe without reading any other packets. Returns None if this fails."""
        decode = ffmpeg.decoder(self._stream, self.info.crop)
        frames: list[VideoFrame] = []
        self._has_decoded = True
        try:
            for packet in self._from(keyframe, ffmpeg.ignore_damage):
                frames = decode(packet)
                if frames or not self.info.interlaced:  # an interlaced video packet may contain only half a frame
                    break
            frames = frames or decode(None)
        except (av.error.FFmpegError, Unreachable):
            self._is_damaged = True
            return None
        if not frames:
            self._is_damaged = True
            return None
        if frames[0].is_corrupt:
            self._is_damaged = True
        stamp = ffmpeg.frame_time(frames[0], self._stream)
        if stamp is None or not _is_whole(frames[0]):
            return None
        return stamp - self.info.start_s, frames[0]

    def can_spare(self) -> bool:
        """Return True if the decoder can skip frames selected by their timestamps without changing the remaining frames.

        An HEVC frame may be marked as non-reference, but the mark applies only within the frame's own layer, so the header must
        specify a single layer. Interlaced video is excluded, because a frame may be stored in two packets.
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
    def _has_index(self) -> bool:
        """True if the index lists all packets or, in Matroska, if there is one."""
        listed = len(self._stream.index_entries)
        if self.info.container == ffmpeg.MATROSKA:
            return listed > 0
        return self.info.container in (ffmpeg.MOV, ffmpeg.AVI) and listed == self._stream.frames > 0

    @property
    def _is_seekable(self) -> bool:
        """True if frames decoded after a seek have the same timestamps as frames decoded from the beginning.

        An AVI counts its frames. After a seek, they have the same numbers if the index lists them all and none is reordered.
        """
        if self.info.container == ffmpeg.AVI:
            return self._has_index and self._stream.start_time is not None and not self._reorders
        return self._has_times

    @property
    def _reorders(self) -> bool:
        return bool(self._stream.codec_context.has_b_frames)

    @property
    def _has_times(self) -> bool:
        return self.info.container in SEEKABLE and not self.info.clock_restarts and self._stream.start_time is not None

    def _new_clock(self) -> Clock:
        """Return a clock for one pass. After a seek, it must not find more restarts than were found in the entire file."""
        return Clock(longest_gap_s(self.info.container)) if self.info.clock_restarts else Clock()

    def _rewind(self) -> None:
        if not self._at_beginning:
            self.close()
            self._open()

    def _packets(self, damaged: ffmpeg.Damage = ffmpeg.ignore_damage) -> Iterator[Packet | None]:
        self._at_beginning = False
        self.playhead = None
        in_order = self.info.container == ffmpeg.AVI and not self._reorders
        packets = ffmpeg.packets(self._container, self._stream, self._noting(damaged))
        for packet in self._new_clock().steady(packets, self._stream):
            if packet is not None and in_order:
                packet.pts = packet.dts  # FFmpeg delays H.264 by a frame, unlike `ffmpeg.frame_time`
            yield packet

    def _noting(self, damaged: ffmpeg.Damage) -> ffmpeg.Damage:
        """Return a callback that notes the damage and then calls the given callback."""

        def note(mark: object) -> None:
            self._is_damaged = True
            damaged(mark)

        return note

    def _stamp(self, packet: Packet) -> int | None:
        """Return a packet's identifying timestamp, which is its decoding time or, in Matroska, its display time."""
        return packet.pts if self.info.container == ffmpeg.MATROSKA else packet.dts

    def _seek(self, time_s: float) -> None:
        """Seek to a time in seconds from the first frame. Raises `Unreachable` if seeking fails."""
        self._at_beginning = False
        self.playhead = None
        try:
            self._container.seek(math.floor((time_s + self.info.start_s) / self._stream.time_base), stream=self._stream)
        except (av.error.FFmpegError, OverflowError) as error:
            raise Unreachable from error

    def _from(self, keyframe: Keyframe, damaged: ffmpeg.Damage) -> Iterator[Packet | None]:
        """Seek to a keyframe and return the packets from there onward. Raises `Unreachable` if seeking fails."""
        for back_s in BACK_S:
            self._seek(keyframe.time_s + self.tolerance_s - back_s)
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
        """Yield packets unchanged, telling the decoder before each packet whether it may skip the packet's frame."""
        context = self._stream.codec_context
        tick = float(self._stream.time_base)
        ahead: deque[Packet | None] = deque()
        shown: list[float] = []  # display times of nearby frames, ascending
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
                needed = count < FIRST or time is None or _is_wanted(time - begin_s, shown, times_s, self.tolerance_s)
                context.skip_frame = "DEFAULT" if needed else "NONREF"
                yield packet
                count += 1
                del shown[: max(0, len(shown) - 2 * LOOK_AHEAD)]
        finally:
            context.skip_frame = "DEFAULT"

    def _decoded(self, packets: Iterator[Packet | None], damaged: ffmpeg.Damage) -> Iterator[TimedFrame]:
        """Decode packets, and yield the frames with their timestamps in seconds from the first frame.

        A frame without a timestamp is placed one frame interval after the previous frame.
        """
        self._has_decoded = True
        info = self.info
        step = 1 / (info.fps or ffmpeg.FALLBACK_FPS)
        time = -step

        def stamp_of(frame: VideoFrame) -> float | None:
            return ffmpeg.frame_time(frame, self._stream)

        frames = ffmpeg.decoded_frames(self._stream, packets, self._noting(damaged), info.crop)
        if info.clock_restarts and info.container not in WITH_DECODING_TIMES:
            timed = self._new_clock().corrections(frames, stamp_of, lambda _: step)
        else:
            timed = ((frame, 0.0) for frame in frames)  # their packets were corrected
        for frame, shift_s in timed:
            stamp = stamp_of(frame)
            if stamp is None:
                time += step
            else:
                time = stamp + shift_s - info.start_s
            yield time, frame


def _is_whole(frame: VideoFrame) -> bool:
    """Return True if a frame is undamaged and depends on no other frame.

    Checking the keyframe flag is not enough, because a flagged frame may only be the start of a gradual refresh.
    """
    return bool(frame.key_frame) and frame.pict_type == PictureType.I and not frame.is_corrupt


def _is_wanted(time_s: float, shown_s: Sequence[float], times_s: Sequence[float], tolerance_s: float) -> bool:
    """Return True if the frame that appears at `time_s` is on screen at any of the requested times.

    Args:
        shown_s: Display times of nearby frames, in ascending order.
        times_s: Requested times, in ascending order.
        tolerance_s: See `Video.tolerance_s`.
    """
    following = bisect_right(shown_s, time_s)
    ends_s = shown_s[following] if following < len(shown_s) else math.inf
    first = bisect_left(times_s, time_s - tolerance_s)
    return first < len(times_s) and times_s[first] + tolerance_s < ends_s
