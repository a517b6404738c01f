"""Everything that is done with FFmpeg and Pillow, by name (`TASKS`), and the program of a worker process that does it: it serves
requests over a socket, under limits, until the other end closes. Where that is not possible, `isolation` runs the tasks itself.

Every message is a request and gets one answer.
- `{"task", "folder", "arguments"}` runs one of `TASKS` in that working directory. The task `frames` opens a video.
- `{"shape", "piece", "last"}` fills an array of that shape with the next frames of the open video. `piece` numbers the memory
  that holds the array; new memory comes with the message as a file descriptor; None means that it is used only once. `last`
  says that no further array follows. The first request of this kind comes in one message with the task `frames`.
- The task `live` opens a source that does not wait, of which a pipe comes as a file descriptor. Then the task `next` looks for
  its next frame, and `shape` takes it.
- The task `clip` begins a clip. Then each `shape`, a number of bytes, takes as many or fewer; the answer to the last one says so.
- The answer is `{"result"}`, or `{"error"}` for the user, or `{"memory"}` with the limit that was exceeded, or `{"bug"}`.
"""

import mmap
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from evoprune.errors import EvopruneError, VideoError
from evoprune.video.info import PICTURE, FrameTimes, ScanResult, Video
from evoprune.video.readers import decord, ffmpeg, folder, probing, pyav, subtitles
from evoprune.video.readers.cutting import ClipReader
from evoprune.video.readers.live import LiveReader
from evoprune.video.sandbox.channel import Channel

if sys.platform != "win32":  # where no process is apart
    import fcntl
    import resource

# Memory that any video may take, in bytes: libraries, stacks of threads, the tables of a long file, one large picture.
BASE_BYTES = 2**30
# And for each pixel of a picture: 16 reference pictures, one picture in each of 16 threads, and some in queues, of up to
# 3 bytes a pixel (10 bits, 4:2:0). Of further decoders, which have one thread, half as much.
BYTES_PER_PIXEL = 128


def counted(done: int) -> None:
    """Called after each frame that is read or scanned, with how many there are so far. A worker process tells it now and then."""


def probe(path: str, folder_fps: float) -> Video:
    """See `evoprune.video.frames.probe`."""
    with ffmpeg.reading(path):
        if os.path.isdir(path):
            return folder.probe(path, folder_fps)
        if ffmpeg.picture_format(path):
            from evoprune.video.readers import picture  # Pillow's import would delay every video

            if picture.is_picture(path):
                return picture.probe(path)
        return probing.probe(path)


def scan(path: str, folder_fps: float) -> ScanResult:
    """See `evoprune.video.frames.scan`."""
    began = time.perf_counter()
    info = probe(path, folder_fps)
    if info.kind == PICTURE:
        raise VideoError(f"{path} is a picture, which has nothing to scan", "leave out --scan")
    reader = folder if info.container == folder.CONTAINER else pyav
    damage = set()
    frames = 0
    end_s = 0.0
    # intervals by their length, rounded so that equal ones count together
    gaps = Counter()
    keyframes = Counter()
    with ffmpeg.reading(path):
        for time_s, length_s, key in reader.intervals(info, damage.add):
            if not frames:
                first_s = last_s = key_s = time_s
            else:
                gaps[round(time_s - last_s, 4)] += 1
                if key:
                    keyframes[round(time_s - key_s, 4)] += 1
                    key_s = time_s
            frames = frames + 1
            last_s = time_s
            end_s = time_s + length_s
            counted(frames)
    if not frames:
        raise ffmpeg.nothing_decoded(path)
    if info.duration_s is not None and first_s + info.duration_s > last_s:  # see `probing._measured`
        end_s = min(end_s, first_s + info.duration_s)
        if info.container == ffmpeg.AVI:  # which may repeat its last frame without data
            end_s = first_s + info.duration_s
    keyframes[round(end_s - key_s, 4)] += 1
    median_gap = _median(gaps)
    irregular = sum(n for gap, n in gaps.items() if abs(gap - median_gap) > probing.RATE_JITTER_S)
    return ScanResult(
        frames=frames,
        damaged=max(0, len(damage) - ffmpeg.incomplete_joints(info)),
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


def check_decord(info: dict[str, Any] | None) -> None:
    """Raises UsageError if decord cannot be loaded, VideoError if it cannot read this video."""
    decord.load()
    if info is not None:
        decord.check(Video(**info))


def frame_times(info: dict[str, Any]) -> FrameTimes:
    """See `evoprune.video.frames.frame_times`."""
    return pyav.frame_times(Video(**info))


TASKS = {
    "probe": probe,
    "scan": scan,
    "frame_times": frame_times,
    "check_decord": check_decord,
    "subtitles": subtitles.read,
}


def run(task: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a task as plain data."""
    result = TASKS[task](**arguments)
    return result and asdict(result)


class FrameReader:
    """Read the frames on screen at given times, in order; arguments as of `isolation.stream_frames`."""

    def __init__(self, info: Video, times_s: Sequence[float], decoder: str, **how):
        ffmpeg.picture_size(info.width * info.height)
        self._damaged: set[object] = set()
        self._joints = ffmpeg.incomplete_joints(info)
        if info.kind == PICTURE:
            from evoprune.video.readers import picture  # Pillow's import would delay every video

            self._frames = picture.read(info, times_s, self._damaged.add)
        elif info.container == folder.CONTAINER:
            self._frames = folder.read(info, times_s, self._damaged.add)
        elif decoder == "decord":
            self._frames = decord.read(info, times_s, self._damaged.add)
        else:
            self._frames = pyav.read(info, times_s, self._damaged.add, **how)

    def fill(self, frames: np.ndarray) -> dict[str, Any]:
        """Write the next frames into uint8 `[n, H, W, 3]`.

        Returns fields of `FrameChunk`: the time of each frame in seconds, how many damaged packets were found that earlier calls
        did not find, whether a frame has another shape than the video, and whether one was moved.
        """
        before = self._count()
        filled = []
        for slot in frames:
            shown = next(self._frames)
            slot[:] = shown.rgb
            filled.append(shown)
            counted(len(filled))
            ffmpeg.alive()
        return {
            "times_s": [shown.time_s for shown in filled],
            "damaged": self._count() - before,
            "other_size": any(shown.other_size for shown in filled),
            "moved": any(shown.moved for shown in filled),
        }

    def _count(self) -> int:
        return max(0, len(self._damaged) - self._joints)

    def close(self) -> None:
        self._frames.close()


def main(descriptor: int) -> None:
    """Serve the socket with that file descriptor. Standard input is a pipe without data; this process ends when it closes."""
    _end_with(0)
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):  # files cannot grow, and there are no core dumps
        resource.setrlimit(what, (0, 0))
    # If memory runs out, the system kills this process first.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # not every system has it
        file.write("1000")
    channel = Channel(socket.socket(fileno=descriptor), descriptors=1)
    ffmpeg.report_alive = channel.report_alive
    ffmpeg.picture_size = _allow
    global counted
    counted = partial(setattr, channel, "done")
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other end is closed
        _serve(channel)


def _end_with(pipe: int) -> None:
    """Make the system kill this process, whatever it does, when the last writer of a pipe is gone."""
    # PR_SET_PDEATHSIG would do so when the thread that started the process ends.
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    hung_up = select.poll()
    hung_up.register(pipe, select.POLLHUP)
    if hung_up.poll(0):  # gone already
        os.kill(os.getpid(), signal.SIGIO)


def _allow(pixels: int, decoders: int = 1) -> None:
    """Raise the memory limit to what so many decoders of pictures of that size need."""
    needed = BASE_BYTES + BYTES_PER_PIXEL * pixels
    if decoders > 1:
        needed += pyav.ROOM_BYTES + (decoders - 1) * pyav.DECODER_BYTES * pixels
    _limit(max(needed, resource.getrlimit(resource.RLIMIT_DATA)[0]))


def _limit(memory: int) -> None:
    """Set the memory limit in bytes, within the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        memory = min(memory, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))


class Server:
    """Answer messages. `close` closes the reader that one of them has opened."""

    def __init__(self):
        self._reader: FrameReader | LiveReader | ClipReader | None = None

    def result(self, message: dict[str, Any], array: np.ndarray | None = None) -> Any:
        """Run the task of a message, if it has one, and fill the array, if there is one."""
        result = None
        task = message.get("task")
        if task == "next":
            result = self._reader.next(**message["arguments"])
        elif task:
            self.close()
            self._reader, result = _begin(task, message["arguments"])
        if array is not None:
            result = self._reader.fill(array)
        return result

    def close(self) -> None:
        if self._reader:
            self._reader.close()
        self._reader = None


def _serve(channel: Channel) -> None:
    server = Server()
    pieces = {}
    while True:
        message, memory = channel.receive()
        shape, piece, last = (message.pop(name, None) for name in ("shape", "piece", "last"))
        try:
            task = message.get("task")
            if task and task != "next":
                pieces.clear()
                _limit(BASE_BYTES)
                _enter(message["folder"])
            if task == "live":
                message["arguments"]["descriptor"] = memory
                memory = None
            if memory is not None:  # first, because it closes the descriptor whatever fails later
                pieces[piece] = _mapped(memory)
            array = pieces[piece][: prod(shape)].reshape(shape) if shape else None
            answer = {"result": server.result(message, array)}
        except EvopruneError as problem:
            answer = {"error": {name: getattr(problem, name) for name in ("type", "message", "hint", "stage")}}
        except MemoryError:
            answer = {"memory": resource.getrlimit(resource.RLIMIT_DATA)[0]}
        except Exception:
            answer = {"bug": traceback.format_exc()}
        array = None  # an idle process holds no memory for frames
        pieces.pop(None, None)  # used only once
        if last or "result" not in answer:
            pieces.clear()
        channel.send(answer)


def _enter(folder: str | None) -> None:
    """Make a folder the working directory, if one is given. Raises VideoError."""
    if folder is not None:
        try:
            os.chdir(folder)
        except OSError as error:
            raise VideoError(f"cannot enter {folder}: {error.strerror}", "give the whole path of the video") from error


def _begin(task: str, arguments: dict[str, Any]) -> tuple[FrameReader | LiveReader | ClipReader | None, dict | None]:
    """Run a task. Returns the reader that it opens, if any, and its result."""
    if task == "frames":
        return FrameReader(Video(**arguments.pop("info")), **arguments), None
    if task == "live":
        reader = LiveReader(**arguments)
        return reader, dict(reader.facts)
    if task == "clip":
        reader = ClipReader(Video(**arguments.pop("info")), **arguments)
        return reader, reader.facts
    return None, run(task, arguments)


def _mapped(descriptor: int) -> np.ndarray:
    """Return uint8 `[bytes]`: memory that is shared with the other process. Closes the descriptor."""
    with os.fdopen(descriptor, "rb+", buffering=0) as file:
        try:
            return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        except OSError as error:
            raise MemoryError(f"no memory for frames: {error.strerror}") from error
