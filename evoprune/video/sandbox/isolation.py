"""Reading videos in a process apart: what a broken or malicious video does to a decoder, it does there.

On Linux; elsewhere (`POSSIBLE` is false) everything runs in this process, and FFmpeg is trusted.

A process (`worker`) is started where none is idle, and reads one video at a time; two videos at once, in two threads, are two
processes. One that crashes, or takes too much memory, is replaced once, because an earlier video may have spoilt it; the second
time it is the video's fault, and so is silence. One that is left in the middle of something is ended.
"""

import atexit
import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Any

from evoprune.errors import OutOfMemory, UsageError, VideoError
from evoprune.video.info import VideoInfo
from evoprune.video.sandbox.channel import Channel

if TYPE_CHECKING:
    import numpy as np

# Not in a program that was frozen into one file: that is no Python.
POSSIBLE = sys.platform == "linux" and bool(sys.executable) and not hasattr(sys, "frozen")
# Whoever reads a video and takes no step forward for so long hangs, in seconds.
SILENCE_S = 25.0
# How many processes are kept for later videos.
IDLE = 2
# How many arrays of a video share memory that is used again: the caller's, the one before it, and the one that is being filled.
PIECES = 3
# What a process runs: it imports from where this one does.
PROGRAM = "import sys; sys.path[:] = {paths}; from evoprune.video.sandbox.worker import main; main({socket})"
ERRORS = {error.type: error for error in (UsageError, VideoError, OutOfMemory)}
HINT = "it is damaged, or made to do harm; if it plays elsewhere, convert it, e.g. with ffmpeg"

# uint8 [n, H, W, 3], since when each is shown in seconds, and how much damage was met on the way.
Filled = tuple["np.ndarray", list[float], int]


class Crash(VideoError):
    """The process that read a video is gone, or no longer of use."""


def call(task: str, path: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Runs one of `tasks.TASKS`, and returns its result as plain data.

    Args:
        path: of the video.
        arguments: of the task, plain data.

    Raises:
        VideoError: the process crashed or took too much memory, twice, or took no step forward for `SILENCE_S`.
        OutOfMemory: none can be started.
        What the task raises.
    """
    if not POSSIBLE:
        from evoprune.video.sandbox.tasks import TASKS

        result = TASKS[task](**arguments)
        return result and asdict(result)
    try:
        return _call(task, path, arguments)
    except Crash:
        return _call(task, path, arguments)


def _call(task: str, path: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    with _borrowed(path) as worker:
        worker.ask(task, arguments)
        return worker.answer()


def pictures(info: VideoInfo, times_s: Sequence[float], decoder: str, counts: Sequence[int]) -> Iterator[Filled]:
    """The pictures on screen at some moments, so many to an array; see `decode.read_frames`.

    The process that fills the arrays, in memory that it shares with this one, is one of them ahead.

    Args:
        info: the video.
        times_s: moments in seconds, ascending.
        decoder: `pyav` or `decord`.
        counts: at least one; their sum is the number of moments.

    Raises:
        What `call` raises, while iterating.
    """
    if not POSSIBLE:
        import numpy as np

        from evoprune.video.sandbox.tasks import Pictures

        with closing(Pictures(info, times_s, decoder)) as taken:
            for count in counts:
                frames = np.empty((count, info.height, info.width, 3), np.uint8)
                yield frames, *taken.fill(frames)
        return
    done = 0
    try:
        with closing(_pictures(info, times_s, decoder, counts)) as arrays:
            for filled in arrays:
                done += 1
                yield filled
    except Crash:
        yield from _pictures(info, times_s[sum(counts[:done]) :], decoder, counts[done:])


def _pictures(info: VideoInfo, times_s: Sequence[float], decoder: str, counts: Sequence[int]) -> Iterator[Filled]:
    shapes = [(count, info.height, info.width, 3) for count in counts]
    memory = _Memory(max(map(prod, shapes)))
    with _borrowed(info.path) as worker:
        begin = worker.asked("frames", {"info": asdict(info), "times_s": list(times_s), "decoder": decoder})
        # At once: a message each way costs as much as a small picture.
        coming = worker.ask_to_fill(memory, shapes[0], begin | {"last": len(shapes) == 1})
        for number, shape in enumerate(shapes[1:], 2):
            filled = coming, *worker.answer()
            del coming  # only who gets it holds it
            coming = worker.ask_to_fill(memory, shape, {"last": number == len(shapes)})
            yield filled
            del filled
        filled = coming, *worker.answer()
        del coming
    yield filled


class _Memory:
    """Memory that two processes share, for the pictures of one video, array after array.

    A piece is used again as soon as nobody holds the array in it, nor a view of that: a fresh one is taken from the system page by
    page, in both processes, which costs as much as a picture costs to decode. Whoever holds more than `PIECES` arrays gets the
    others in memory of their own.
    """

    def __init__(self, size: int):
        """`size`: bytes of the largest array."""
        self._size, self._forks = size, _forks
        self._pieces: list[mmap.mmap] = []
        self._free: list[int] = []

    def take(self, shape: tuple[int, ...]) -> tuple["np.ndarray", int | None, int | None]:
        """uint8 of that shape, the number of the piece that it lies in, and a descriptor of new memory, which the caller closes.

        There is no number where the array has memory of its own, and no descriptor where the memory is not new.

        Raises OSError where there is no memory.
        """
        import numpy as np

        size = prod(shape)
        if self._forks != _forks:  # what this process lets go of a copy of it may hold: none of that again
            self._forks, self._pieces, self._free = _forks, [], []
        if self._free:
            number, descriptor = self._free.pop(), None
        elif len(self._pieces) < PIECES and 2 * size > self._size:  # the end of a video may be small, and held for long
            piece, descriptor = _shared(self._size)
            number = len(self._pieces)
            self._pieces.append(piece)
        else:
            own, descriptor = _shared(size)
            return np.frombuffer(own, np.uint8).reshape(shape), None, descriptor
        whole = np.frombuffer(self._pieces[number], np.uint8, size)  # what all views of it keep alive
        weakref.finalize(whole, self._free.append, number).atexit = False
        return whole.reshape(shape), number, descriptor


def _shared(size: int) -> tuple[mmap.mmap, int]:
    """So many bytes, and a descriptor for another process, which cannot take them away again."""
    import fcntl

    descriptor = os.memfd_create("evoprune-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return mmap.mmap(descriptor, 0), descriptor
    except OSError:
        os.close(descriptor)
        raise


class _Worker:
    """A process that reads videos; it does one thing after the other.

    Attributes:
        path: the video that it reads.
        busy: whether it was asked for something that it has not answered.
    """

    def __init__(self):
        self.path, self.busy = "", False
        here, there = socket.socketpair()
        here.settimeout(SILENCE_S)
        self._channel = Channel(here)
        self._said = os.fdopen(os.memfd_create("evoprune-stderr"), "rb", buffering=0)
        program = PROGRAM.format(paths=[os.path.abspath(path) for path in sys.path], socket=there.fileno())
        with there:
            self._process = subprocess.Popen(  # noqa: S603 (this Python, and a program of our own)
                # No site: the paths are all that is needed of it.
                [sys.executable, "-I", "-S", f"-Xutf8={sys.flags.utf8_mode}", "-c", program],
                stdin=subprocess.PIPE,  # which ends with this process, and that one with it
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # numpy would start threads that nobody needs
                pass_fds=[there.fileno()],
                start_new_session=True,  # Ctrl-C is for this process
            )
        self.pid = self._process.pid

    def ask(self, task: str, arguments: dict[str, Any]) -> None:
        self._send(self.asked(task, arguments))

    def asked(self, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The message that asks for it."""
        try:
            folder = None if os.path.isabs(self.path) else os.getcwd()
        except FileNotFoundError as error:
            raise VideoError(f"cannot read {self.path}: the current folder is gone", "go to another") from error
        return {"task": task, "folder": folder, "arguments": arguments}

    def ask_to_fill(self, memory: _Memory, shape: tuple[int, ...], more: dict[str, Any]) -> "np.ndarray":
        """uint8 of that shape, which will hold the next pictures once that is answered; `more`: what the message says too."""
        try:
            frames, number, descriptor = memory.take(shape)
        except OSError as error:
            self.busy = True  # in the middle of a video: it is ended
            if error.errno == errno.EFBIG:
                raise VideoError(
                    "the limit on the size of files is below that of a few frames", "ulimit -f unlimited"
                ) from error
            raise MemoryError(f"no memory for frames: {error.strerror}") from error
        try:
            self._send({"shape": shape, "piece": number, **more}, descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return frames

    def _send(self, message: dict[str, Any], descriptor: int | None = None) -> None:
        self.busy = True
        try:
            self._channel.send(message, descriptor)
        except OSError as error:
            raise self._crash() from error

    def answer(self) -> Any:
        """What it was asked for; raises what came of that instead."""
        try:
            message, _ = self._channel.receive(SILENCE_S)
        except TimeoutError as error:
            raise VideoError(
                f"reading {self.path} has come to a standstill: nothing for {SILENCE_S:g} s", HINT
            ) from error
        except (OSError, EOFError, ValueError) as error:
            raise self._crash() from error
        if limit := message.get("memory"):  # or was it an earlier video that took it, and did not give it back?
            raise Crash(f"reading {self.path} takes more than {limit / 2**30:.1f} GiB of memory", HINT)
        self.busy = False
        if error := message.get("error"):
            raise ERRORS[error.pop("type")](**error)
        if bug := message.get("bug"):
            problem = RuntimeError(bug.splitlines()[-1])
            problem.add_note(bug)
            raise problem
        return message["result"]

    def _crash(self) -> Crash:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        how = "it talks nonsense" if code is None else signal.strsignal(-code) if code < 0 else f"exit code {code}"
        problem = Crash(f"the decoder crashed on {self.path} ({how})", HINT)
        problem.add_note(os.pread(self._said.fileno(), 2**16, 0).decode(errors="replace"))
        return problem

    def end(self) -> None:
        """At once, whatever it is at."""
        self._process.kill()
        self._process.stdin.close()
        self._channel.close()
        self._said.close()
        with suppress(subprocess.TimeoutExpired):  # it waits for a disk, and goes when that answers
            self._process.wait(1)


_idle: list[_Worker] = []
_lock = threading.Lock()


def warm_up() -> None:
    """Starts a process for the first video, and does not wait for it. Imports little."""
    if POSSIBLE and not _idle:
        with suppress(OSError), _lock:  # who needs one will be told
            _idle.append(_Worker())


@contextmanager
def _borrowed(path: str) -> Iterator[_Worker]:
    """A process for one video, idle or new; it is kept if it has nothing left to answer."""
    with _lock:
        worker = _idle.pop() if _idle else None
    if worker is None:
        try:
            worker = _Worker()
        except OSError as error:
            raise OutOfMemory(
                f"cannot start the process that reads videos: {error.strerror}", "close other programs", stage="read"
            ) from error
    worker.path = path
    try:
        yield worker
    finally:
        with _lock:
            kept = not worker.busy and len(_idle) < IDLE
            if kept:
                _idle.append(worker)
        if not kept:
            worker.end()


@atexit.register
def end_all() -> None:
    """Ends the idle processes. Others end with this one."""
    with _lock:
        ended, _idle[:] = list(_idle), []
    for worker in ended:
        worker.end()


def _forked() -> None:
    """In a copy of this process: those processes are not its own."""
    global _lock, _idle
    _lock, _idle = threading.Lock(), []


_forks = 0


def _forking() -> None:
    """What is held at a fork is held by the copy too, which nobody here can look at."""
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forking, after_in_parent=_forking, after_in_child=_forked)
