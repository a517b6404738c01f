"""The program of a worker process, which runs all tasks that use FFmpeg and Pillow (`TASKS`) with limits on memory and files.

It handles requests from a socket until the other end of the socket is closed. On systems without worker processes, `isolation` runs
the tasks in the current process instead.

Each message is a request that receives exactly one answer:
- `{"task", "folder", "arguments"}` runs one of `TASKS` in the working directory `folder`. The `frames` task opens a video.
- `{"shape", "piece", "last"}` fills an array of this shape with the next frames from the open video. `piece` is the index of the
  piece of shared memory to use, or None if the memory is used only once. If the memory is new, the message carries its file
  descriptor. `last` is true for the video's last array. The first `shape` request is sent in the same message as the `frames` task.
- The `live` task opens a live source. If the source is a pipe, the message carries its file descriptor. After that, the `next` task
  finds the next frame, and a `shape` request retrieves it.
- The `sound` task opens a video's audio track. After that, each `shape` request retrieves up to this number of bytes.
- The `clip` task starts cutting a clip. After that, each `shape` request retrieves up to this number of bytes, and the answer
  indicates whether these are the last bytes.
- The answer contains `result`, `error` (an error to show to the user), `memory` (the memory limit that was exceeded), or `bug` (a
  traceback).
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
from evoprune.video.info import FrameTimes, ScanResult, Video
from evoprune.video.reader_table import FILES, reader_at, reader_of
from evoprune.video.readers import decord, ffmpeg, probing, pyav, subtitles
from evoprune.video.readers.cutting import ClipReader
from evoprune.video.readers.live import LiveReader
from evoprune.video.readers.opened import OpenTracks, keep_open
from evoprune.video.readers.sound import SoundReader
from evoprune.video.sandbox.channel import Channel

if sys.platform != "win32":  # there are no worker processes on Windows
    import fcntl
    import resource

# Base memory limit in bytes for every video. It covers libraries, thread stacks, a long file's tables, and one large image.
BASE_BYTES = 2**30
# Additional memory in bytes per frame pixel. It covers 16 reference frames, one frame in each of 16 threads, and some queued
# frames, at up to 3 bytes per pixel (10 bits, 4:2:0). Each additional decoder has one thread and needs half as much memory
# (`pyav.DECODER_BYTES`).
BYTES_PER_PIXEL = 128
KEEP_OPEN_S = 10.0  # an idle process closes its video after this time


def counted(done: int) -> None:
    """Report the number of frames read or scanned so far. Called after each frame; worker processes include it in heartbeats."""


def probe(path: str, folder_fps: float) -> Video:
    """Read the metadata of a video, a still image, or a folder of images. See `evoprune.video.frames.probe`."""
    with ffmpeg.converting(path):
        return reader_at(path).load().probe(path, folder_fps)


def scan(path: str, folder_fps: float) -> ScanResult:
    """Decode an entire video to find damage and measure its length. See `evoprune.video.frames.scan`."""
    began = time.perf_counter()
    info = probe(path, folder_fps)
    damage = set()
    frames = 0
    end_s = 0.0
    # Histogram of frame intervals, rounded so that equal intervals are counted together.
    gaps = Counter()
    keyframes = Counter()
    with ffmpeg.converting(path):
        for time_s, length_s, key in reader_of(info).load().intervals(info, damage.add):
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
        if info.container == ffmpeg.AVI:  # an AVI may use empty packets to repeat its last frame
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
    """Raise UsageError if decord cannot be loaded, or VideoError if it cannot correctly read the given video."""
    decord.load()
    if info is not None:
        decord.check(Video(**info))


def frame_times(info: dict[str, Any]) -> FrameTimes:
    """Return the display times of all frames in a video. See `evoprune.video.frames.frame_times`."""
    video = Video(**info)
    with ffmpeg.converting(video.path):
        return reader_of(video).load().frame_times(video)


TASKS = {
    "probe": probe,
    "scan": scan,
    "frame_times": frame_times,
    "check_decord": check_decord,
    "subtitles": subtitles.read,
}


def run(task: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Run a task and return its result as a JSON-serializable dict."""
    result = TASKS[task](**arguments)
    return result and asdict(result)


class FrameReader:
    """Reads the frames on screen at the requested times, in order. For the arguments, see `isolation.stream_frames`."""

    def __init__(self, info: Video, times_s: Sequence[float], decoder: str, **how):
        ffmpeg.picture_size(info.width * info.height)
        self._damaged: set[object] = set()
        self._joints = ffmpeg.incomplete_joints(info)
        self._path = info.path
        reader = reader_of(info)
        module = reader.load()
        if reader is not FILES:
            how = {}  # only video files have keyframes to choose from
        elif decoder == "decord":
            module, how = decord, {}
        self._frames = module.read(info, times_s, self._damaged.add, **how)

    def fill(self, frames: np.ndarray) -> dict[str, Any]:
        """Fill `frames` with the next n frames as uint8 `[n, H, W, 3]`.

        Returns:
            The `times_s`, `damaged`, `other_size`, and `moved` fields of a `FrameChunk`.
        """
        before = self._count()
        filled = []
        for slot in frames:
            with ffmpeg.converting(self._path):
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
    """Handle requests from a socket. The process exits when its standard input, a pipe without data, is closed.

    Args:
        descriptor: File descriptor of the socket.
    """
    _end_with(0)
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):  # no writing to files, and no core dumps
        resource.setrlimit(what, (0, 0))
    # If memory runs out, the system should kill this process first.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # this file doesn't exist on every system
        file.write("1000")
    channel = Channel(socket.socket(fileno=descriptor), descriptors=1)
    ffmpeg.report_alive = channel.report_alive
    ffmpeg.picture_size = _allow
    global counted
    counted = partial(setattr, channel, "done")
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other end was closed
        _serve(channel, keep_open())


def _end_with(pipe: int) -> None:
    """Make the operating system kill this process, even while busy, when the last writer closes the other end of a pipe."""
    # PR_SET_PDEATHSIG is not suitable, because it kills the process as soon as the thread that started the process exits.
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    hung_up = select.poll()
    hung_up.register(pipe, select.POLLHUP)
    if hung_up.poll(0):  # the pipe is already closed
        os.kill(os.getpid(), signal.SIGIO)


def _allow(pixels: int, decoders: int = 1) -> None:
    """Raise this process's memory limit to accommodate `decoders` decoders for frames with `pixels` pixels."""
    needed = BASE_BYTES + BYTES_PER_PIXEL * pixels
    if decoders > 1:
        needed += pyav.ROOM_BYTES + (decoders - 1) * pyav.DECODER_BYTES * pixels
    _limit(max(needed, resource.getrlimit(resource.RLIMIT_DATA)[0]))


def _limit(memory: int) -> None:
    """Set this process's memory limit to `memory` bytes or the hard limit, whichever is lower."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        memory = min(memory, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))


Reader = FrameReader | LiveReader | ClipReader | SoundReader


class Server:
    """Handles a worker process's messages. A reader stays open until another task begins or `close` is called."""

    def __init__(self):
        self._reader: Reader | None = None

    def result(self, message: dict[str, Any], array: np.ndarray | None = None) -> Any:
        """Run the task in a message, if any, and then fill the array, if given. Returns the result of the last step."""
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


def _serve(channel: Channel, tracks: OpenTracks) -> None:
    server = Server()
    pieces = {}
    while True:
        if not channel.has_message(KEEP_OPEN_S):
            tracks.close()
        message, memory = channel.receive()
        shape, piece, last = (message.pop(name, None) for name in ("shape", "piece", "last"))
        try:
            task = message.get("task")
            if task and task != "next":
                server.close()
                if task not in ("frames", "subtitles"):  # a batch alternates between them
                    tracks.close()
                pieces.clear()
                _limit(BASE_BYTES + tracks.memory_bytes)
                _enter(message["folder"])
            if task == "live":
                message["arguments"]["descriptor"] = memory
                memory = None
            if memory is not None:  # mapped first, so that the descriptor is closed even if a later step fails
                pieces[piece] = _mapped(memory)
            array = pieces[piece][: prod(shape)].reshape(shape) if shape else None
            answer = {"result": server.result(message, array)}
        except EvopruneError as problem:
            answer = _error(problem)
        except MemoryError:
            answer = {"memory": resource.getrlimit(resource.RLIMIT_DATA)[0]}
        except Exception:
            answer = {"bug": traceback.format_exc()}
        array = None  # so that idle processes don't hold memory for frames
        pieces.pop(None, None)  # this piece is used only once
        if last or "result" not in answer:
            pieces.clear()
        try:
            channel.send(answer)
        except VideoError as problem:  # the answer is too long
            channel.send(_error(problem))
        if last:
            server.close()


def _error(problem: EvopruneError) -> dict[str, Any]:
    return {"error": {name: getattr(problem, name) for name in ("type", "message", "hint", "stage")}}


def _enter(folder: str | None) -> None:
    """Change the working directory to `folder` unless it is None. Raises VideoError if the folder is not accessible."""
    if folder is not None:
        try:
            os.chdir(folder)
        except OSError as error:
            raise VideoError(
                f"cannot enter {folder}: {error.strerror}", "give the absolute path of the video"
            ) from error


def _begin(task: str, arguments: dict[str, Any]) -> tuple[Reader | None, dict | None]:
    """Run a task. Returns the reader opened by the task, or None if there isn't one, and the result of the task."""
    if task == "frames":
        return FrameReader(Video(**arguments.pop("info")), **arguments), None
    if task == "sound":
        return SoundReader(Video(**arguments.pop("info")), **arguments), None
    if task == "live":
        reader = LiveReader(**arguments)
        return reader, dict(reader.facts)
    if task == "clip":
        reader = ClipReader(Video(**arguments.pop("info")), **arguments)
        return reader, reader.facts
    return None, run(task, arguments)


def _mapped(descriptor: int) -> np.ndarray:
    """Map shared memory as a uint8 array `[bytes]` and close its descriptor. Raises MemoryError if mapping fails."""
    with os.fdopen(descriptor, "rb+", buffering=0) as file:
        try:
            return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        except OSError as error:
            raise MemoryError(f"no memory for frames: {error.strerror}") from error
