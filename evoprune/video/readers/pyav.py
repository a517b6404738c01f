"""Reads video files using PyAV, which supports all FFmpeg formats and continues reading after damaged data.

`planned` groups the requested times into runs. Each run covers one group of pictures, which is decoded only once. Multiple threads
decode the runs in parallel, each with its own decoder. Because the runs depend only on the file and the times, the result is
independent of the number of threads. `intervals` decodes all frames of a file.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

from av.video.frame import VideoFrame

from evoprune.backend import Host
from evoprune.video.info import FrameTimes, Video
from evoprune.video.readers import colour, ffmpeg, probing
from evoprune.video.readers.deinterlacing import deinterlaced
from evoprune.video.readers.opened import open_tracks
from evoprune.video.readers.track import (
    BACK_S,
    DECODER_BYTES,
    MAX_ENTRIES,
    Keyframe,
    TimedFrame,
    Track,
    Unreachable,
)
from evoprune.video.readers.workers import in_order

BEGINNING_S = 1.0  # runs with a keyframe before this time are decoded from the start of the file
MAX_NEAR = 3  # number of keyframes to try when moving a time, nearest first
# With seek "auto", times are moved to keyframes only if the parts of the video last at least `LEAST_PART_S` seconds and if this
# avoids decoding at least this many pixels, which would take two to three seconds on a single core.
SAVED_PIXELS = 10**9
LEAST_PART_S = 1.0
ROOM_BYTES = 2**29  # memory for decoded frames waiting to be yielded


@dataclass(frozen=True)
class Run:
    """A group of requested times with frames that are decoded in a single pass."""

    times_s: tuple[float, ...]
    entries: tuple[Keyframe | None, ...]  # where to start decoding, best first; None means the beginning of the file
    near: tuple[Keyframe, ...] = ()  # keyframes to which the run's single time may be moved, nearest first


def claims(path: str) -> bool:
    """Return True, because FFmpeg recognizes its own files, and no other reader is asked after this one."""
    return True


def probe(path: str, fps: float) -> Video:
    """Read a video file's metadata. See `evoprune.video.frames.probe`. A file specifies its own frame rate, so `fps` is ignored."""
    with ffmpeg.reading(path):
        return probing.probe(path)


def read(
    info: Video,
    times_s: Sequence[float],
    damaged: ffmpeg.Damage,
    seek: str = "exact",
    part_s: float = 0.0,
    cores: int | None = None,
) -> ffmpeg.Frames:
    """Yield the frame on screen at each requested time. See the docstring of the `readers` package.

    Args:
        damaged: Callback for damaged data. It may be called more than once for the same damage.
        seek, part_s: See `frames.read_chunks`.
        cores: Number of CPU cores to use, or None for all cores available to this process.
    """
    cores = cores or Host().available_cores()
    with ffmpeg.reading(info.path):
        done = 0
        damage: list[object] = []
        try:
            with closing(_in_parallel(info, times_s, seek, part_s, cores)) as frames:
                for shown, new_damage in frames:
                    for mark in new_damage:
                        damaged(mark)
                    damage += new_damage
                    done += 1
                    yield shown
            return
        except Unreachable:
            rest = Run(tuple(times_s[done:]), (None,))
        # Multi-threaded decoders report damage a few packets late, so the same damage would be counted twice.
        threads = 1 if damage else ffmpeg.thread_count(cores)
        with closing(Track(info, threads)) as track:
            picture = Picture(info)
            for found in _on_screen(track, rest, damaged, sparing=False):
                yield picture.of(*found, moved=False)


def intervals(info: Video, damaged: ffmpeg.Damage) -> Iterator[tuple[float, float, bool]]:
    """Decode all frames of a video. See the docstring of the `readers` package."""
    step = 1 / (info.fps or ffmpeg.FALLBACK_FPS)
    with ffmpeg.reading(info.path), closing(Track(info, ffmpeg.thread_count(Host().available_cores()))) as track:
        for time_s, frame in track.from_beginning((), damaged):
            length = frame.duration if frame.pts is not None else 0
            # PyAV 18 sets no time base for the frames that a decoder returns at the end.
            yield time_s, float((length or 0) * (frame.time_base or 0)) or step, frame.key_frame


def frame_times(info: Video) -> FrameTimes:
    """Return the display times of all frames in a video file. See `evoprune.video.frames.frame_times`."""
    with ffmpeg.reading(info.path):
        with ffmpeg.open_video(info.path) as container:
            stated = ffmpeg.stated_frames(container, ffmpeg.video_stream(container, info.path))
        with closing(Track(info)) as track:
            times = track.times()
        if times is None:
            times = sorted(time_s for time_s, _, _ in intervals(info, ffmpeg.ignore_damage))
        return FrameTimes(times, stated)


def _in_parallel(
    info: Video, times_s: Sequence[float], seek: str, part_s: float, cores: int
) -> Iterator[tuple[ffmpeg.Shown, list[object]]]:
    """Decode the planned runs in parallel. Yields each frame with the damage found since the previous frame.

    Raises:
        Unreachable: See `_on_screen`.
    """
    with open_tracks(info) as tracks:
        with tracks.borrow() as track:
            runs = planned(track, times_s, seek, part_s)
        pixels = info.width * info.height
        threads = min(cores, len(runs), _most_decoders(pixels))
        ffmpeg.picture_size(pixels, threads)

        @contextmanager
        def tools() -> Iterator[Callable[[Run], Iterator[tuple[ffmpeg.Shown, list[object]]]]]:
            with tracks.borrow(ffmpeg.thread_count(cores // threads)) as track:
                picture = Picture(info)

                def work(run: Run) -> Iterator[tuple[ffmpeg.Shown, list[object]]]:
                    damage: list[object] = []
                    for found in _frames(track, run, part_s, damage.append):
                        yield picture.of(*found), damage.copy()
                        damage.clear()

                yield work

        yield from in_order(runs, tools, threads, room=max(2 * threads, ROOM_BYTES // (3 * pixels)))


def _most_decoders(pixels: int) -> int:
    """Return the number of decoders that fit in memory for frames with `pixels` pixels. Returns at least 1."""
    available = Host().available_memory()
    if available is None:
        return 1
    return max(1, int(available / 2 - ROOM_BYTES) // (DECODER_BYTES * pixels))


class Picture:
    """Converts decoded video frames to `ffmpeg.Shown`. Consecutive duplicates of a frame are converted only once."""

    def __init__(self, info: Video):
        self._size = (info.width, info.height)
        self._turn = (info.rotation_deg, info.mirrored)
        self._aspect = info.pixel_aspect
        # If the clock restarts, frames without a specified HDR format may come from a different file than the header.
        header = None if info.clock_restarts else info.hdr_format
        self._converter = colour.Converter(info.path, header)
        self._frame = None
        self._rgb = None
        self._other_size = False

    def of(self, time_s: float, frame: VideoFrame, moved: bool) -> ffmpeg.Shown:
        if frame is not self._frame:
            self._frame = frame
            self._rgb = ffmpeg.to_rgb(frame, *self._size, *self._turn, self._converter, self._aspect)
            self._other_size = ffmpeg.displayed_size(frame, self._aspect, self._turn[0]) != self._size
        return ffmpeg.Shown(time_s, self._rgb, self._other_size, moved)


def planned(track: Track, times_s: Sequence[float], seek: str, part_s: float) -> list[Run]:
    """Group times into runs, and choose the keyframes at which each run can start decoding.

    Args:
        track: The video. Nothing is decoded.
        times_s: Requested times in seconds from the first frame, in ascending order. Must not be empty.
        seek, part_s: See `frames.read_chunks`.
    """
    info = track.info
    # The frames of an AVI have been counted from the beginning, so a frame that is decoded alone has no time.
    moves = info.container != ffmpeg.AVI and (seek == "keyframes" or (seek == "auto" and part_s >= LEAST_PART_S))
    keyframes = _keyframes(track, times_s, part_s if moves else 0.0)
    interlaced = info.interlaced or track.stream.codec_context.field_order > 1
    if len(keyframes) < 2:
        return [Run(tuple(times_s), (None,))]
    ends = [bisect_right(keyframes, time + track.tolerance_s, key=_time_of) for time in times_s]
    places = [
        max(0, end - 1) for end in ends
    ]  # for each time, the index of the last keyframe displayed at or before it
    near = [()] * len(times_s)
    if moves:
        near = [_nearest_keyframes(keyframes, time, part_s / 2, track.tolerance_s) for time in times_s]
    if seek == "auto" and moves:
        frames = [
            (time - keyframes[place].time_s) * (info.fps or ffmpeg.FALLBACK_FPS)
            for time, place, found in zip(times_s, places, near, strict=True)
            if found
        ]
        if sum(frames) * info.width * info.height < SAVED_PIXELS:
            near = [()] * len(times_s)
    runs: list[Run] = []
    for (place, found), same in groupby(zip(places, near, times_s, strict=True), key=itemgetter(0, 1)):
        entries = keyframes[max(0, place - MAX_ENTRIES + 1) : place + 1][::-1]
        group = tuple(time for _, _, time in same)
        for times in [(time,) for time in group] if found else [group]:  # each time that can be moved gets its own run
            starts = entries
            if interlaced and entries[0].time_s > times[0] - 2 / (info.fps or ffmpeg.FALLBACK_FPS):
                starts = [*entries[1:], entries[0]]  # deinterlacing also requires the frame before the requested frame
            runs.append(Run(times, tuple(key if key.time_s > BEGINNING_S else None for key in starts), found))
    return runs


def _keyframes(track: Track, times_s: Sequence[float], part_s: float) -> list[Keyframe]:
    """Return the keyframes from which frames near the given times can be decoded, in ascending order.

    If the times are far apart, the keyframes between them are left out.

    Returns:
        The keyframes, or an empty list if seeking fails. See `Track.keyframes`.
    """
    found: set[Keyframe] = set()
    first_s = times_s[0] - part_s / 2
    try:
        for time_s, next_s in zip(times_s, [*times_s[1:], math.inf], strict=True):
            if next_s - part_s / 2 > time_s + part_s + BACK_S[-1]:
                found.update(track.keyframes(first_s, time_s + part_s))
                first_s = next_s - part_s / 2
    except Unreachable:
        return []
    return sorted(found)


def _time_of(keyframe: Keyframe) -> float:
    return keyframe.time_s


def _nearest_keyframes(
    keyframes: Sequence[Keyframe], time_s: float, reach_s: float, tolerance_s: float
) -> tuple[Keyframe, ...]:
    """Return up to `MAX_NEAR` keyframes within `reach_s` seconds of a time, nearest first.

    A keyframe exactly at the start of this interval is included, whereas a keyframe exactly at its end belongs to the next
    interval.
    """
    first = bisect_left(keyframes, time_s - reach_s - tolerance_s, key=_time_of)
    last = bisect_left(keyframes, time_s + reach_s - tolerance_s, key=_time_of)
    return tuple(sorted(keyframes[first:last], key=lambda keyframe: abs(keyframe.time_s - time_s))[:MAX_NEAR])


def _frames(track: Track, run: Run, part_s: float, damaged: ffmpeg.Damage) -> Iterator[tuple[float, VideoFrame, bool]]:
    """Yield a run's frames as (timestamp in seconds, frame, whether the time was moved to a keyframe). May raise `Unreachable`."""
    for keyframe in run.near:
        frame = track.alone(keyframe)
        # The index may contain decoding times, which are a few frames early, so check the frame's own timestamp.
        if frame and -track.tolerance_s <= frame[0] - run.times_s[0] + part_s / 2 < part_s - track.tolerance_s:
            yield frame[0], deinterlaced(frame[1]), True
            return
    done = 0
    if track.can_spare():
        for frame in _on_screen(track, run, damaged, sparing=True):
            yield *frame, False
            done += 1
    if done < len(run.times_s):
        for frame in _on_screen(track, replace(run, times_s=run.times_s[done:]), damaged, sparing=False):
            yield *frame, False


def start_decoding(
    track: Track, run: Run, damaged: ffmpeg.Damage, *, sparing: bool
) -> tuple[Keyframe | None, Iterator[TimedFrame] | None]:
    """Start decoding a run, trying its entries in order until decoding can start at one of them.

    Returns:
        The entry at which decoding starts and the frames from that entry onward, or None for both if decoding cannot start at any
        entry.
    """
    for entry in run.entries:
        if entry is None:
            frames = track.from_beginning(run.times_s, damaged, sparing=sparing)
        else:
            frames = track.from_keyframe(entry, run.times_s, damaged, sparing=sparing)
        if frames is not None:
            return entry, frames
    return None, None


class Playhead:
    """The frame on screen at the latest requested time, its neighbors, and an iterator over the frames after them.

    Attributes:
        entry: The keyframe at which decoding started, or None for the beginning of the file.
        time_s: The latest requested time in seconds.
        damage: Marks of all damage so far.
    """

    def __init__(self):
        self.entry: Keyframe | None = None
        self.frames: Iterator[TimedFrame] = iter(())
        self.before: TimedFrame | None = None
        self.current: TimedFrame | None = None
        self.upcoming: TimedFrame | None = None
        self.time_s = -math.inf
        self.damage: list[object] = []
        self._shown: TimedFrame | None = None
        self._listener = ffmpeg.ignore_damage

    def close(self) -> None:
        """Stop decoding. The iterator holds a reference to this object, so it would otherwise live on until garbage collection."""
        self.frames = iter(())
        self.before = self.current = self.upcoming = self._shown = None

    def listen(self, damaged: ffmpeg.Damage) -> None:
        """Report all damage so far, and any further damage, to a callback instead of the previous callback."""
        self._listener = damaged
        for mark in self.damage:
            damaged(mark)

    def note(self, mark: object) -> None:
        self.damage.append(mark)
        self._listener(mark)

    def has_next(self, time_s: float) -> bool:
        """Return True if a later frame is on screen at a time, or if no frame is on screen yet."""
        return self.upcoming is not None and (self.current is None or self.upcoming[0] <= time_s)

    def advance(self) -> None:
        self.before, self.current, self._shown = self.current, self.upcoming, None
        self.upcoming = next(self.frames, None)

    def goes_back(self, *, or_stays: bool = False) -> bool:
        """Return True if the upcoming frame's timestamp is earlier than the current one's, or equal if `or_stays` is True."""
        if self.upcoming is None:
            return False
        return self.upcoming[0] < self.current[0] or (or_stays and self.upcoming[0] == self.current[0])

    def shown(self) -> TimedFrame:
        """Return the current frame after deinterlacing."""
        if self._shown is None:
            time_s, frame = self.current
            self._shown = (
                time_s,
                deinterlaced(frame, self.before and self.before[1], self.upcoming and self.upcoming[1]),
            )
        return self._shown


def _on_screen(track: Track, run: Run, damaged: ffmpeg.Damage, *, sparing: bool) -> Iterator[TimedFrame]:
    """Yield the deinterlaced frame on screen at each of a run's times, keeping only this frame and its neighbors in memory.

    If `sparing` is True, the decoder skips unneeded frames. In this case, iteration stops early, without an error, as soon as
    skipping frames becomes unsafe: if there is damage, because the preceding frame stays on screen; if a frame is interlaced; or if
    frames are out of order, because the required frames are identified by their timestamps.
    """
    head = None
    if not sparing and run.entries == (None,):
        head = track.playhead
    if head is not None and head.time_s <= run.times_s[0]:
        head.listen(damaged)
    else:
        head = Playhead()
        if not sparing:
            head.listen(damaged)
        head.entry, frames = start_decoding(track, run, head.note, sparing=sparing)
        if frames is None and sparing:
            return
        if frames is None:
            raise Unreachable
        head.frames = frames
        head.upcoming = next(frames, None)
        if head.upcoming is None:
            raise ffmpeg.nothing_decoded(track.info.path)
        if head.entry is None and not sparing:
            track.playhead = head
    try:
        for time in run.times_s:
            while head.has_next(time + track.tolerance_s):
                head.advance()
                if sparing and (head.damage or head.current[1].interlaced_frame or head.goes_back(or_stays=True)):
                    return
                if head.entry and head.goes_back():
                    raise Unreachable  # the timestamps are wrong, so the frame and keyframe order is unknown
            head.time_s = time
            yield head.shown()
    finally:
        if track.playhead is not head:
            head.close()
