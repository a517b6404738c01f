"""The entry to the sandbox: runs a task, or streams frames, in a worker process, which reads one video at a time.

If it crashes or takes too much memory, the request is repeated once in a new process, because an earlier video may have caused it;
the second time it is the video's fault. A process that hangs is ended, and the request is not repeated.
"""

import atexit
import errno
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import asdict
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evoprune
from evoprune.backend import oom_kills
from evoprune.errors import OutOfMemory, UsageError, VideoError, process_error
from evoprune.video.info import Video
from evoprune.video.sandbox.channel import Channel, FrameMemory

if TYPE_CHECKING:
    import numpy as np

MAX_IDLE = 2  # processes that are kept for later videos
SILENCE_S = 25.0  # a worker that reports no progress for so long counts as hung
CLIP_PIECE = 2**20  # bytes of a clip that come at once
LOOK_S = 0.1  # how often a thread that waits for another one looks whether it is still wanted
# Elsewhere everything runs in this process, and FFmpeg is trusted. The executable of a frozen program is no Python.
POSSIBLE = sys.platform == "linux" and bool(sys.executable) and not hasattr(sys, "frozen")
FilledArray = tuple["np.ndarray", dict[str, Any]]  # uint8 [n, H, W, 3], and what `worker.FrameReader.fill` returns
OnFrames = Callable[[int], None]
# What the process runs. It imports from the same paths as this one.
PROGRAM = "import sys; sys.path[:] = {paths}; from evoprune.video.sandbox.worker import main; main({socket})"
ERRORS = {error.type: error for error in (UsageError, VideoError, OutOfMemory)}
HINT = "it is damaged, or made to do harm; if it plays elsewhere, convert it, e.g. with ffmpeg"


class Crash(VideoError):
    """Report a worker process that has ended, or cannot be used any more."""


class Stopped(Exception):
    """Nobody wants what was to be read: `Scope.stop` has ended it."""


class WorkerProcess:
    """Run a process that reads videos, one request at a time. `path` names the video in messages.

    `busy`: one is unanswered. `stopped`: see `stop`.
    """

    def __init__(self):
        self.path = ""
        self.busy = False
        self._answered = False
        self._oom_kills = oom_kills()
        self.stopped = False
        here, there = socket.socketpair()
        here.settimeout(SILENCE_S)
        self._channel = Channel(here)
        self._stderr = os.fdopen(os.memfd_create("evoprune-stderr"), "rb", buffering=0)
        # An editable install is found by an import hook, which the worker does not have: it needs the folder itself.
        paths = [*map(os.path.abspath, sys.path), str(Path(evoprune.__file__).parents[1])]
        program = PROGRAM.format(paths=list(dict.fromkeys(paths)), socket=there.fileno())
        with there:
            self._process = subprocess.Popen(  # noqa: S603 (this Python, and a program of our own)
                # -S: `site` would only set paths, which PROGRAM sets.
                [sys.executable, "-I", "-S", f"-Xutf8={sys.flags.utf8_mode}", "-c", program],
                stdin=subprocess.PIPE,  # closes when this process ends, and that ends the worker
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # numpy would start threads that nobody needs
                pass_fds=[there.fileno()],
                start_new_session=True,  # Ctrl-C is for this process
            )
        self.pid = self._process.pid

    def request(self, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the message that requests a task. Raises VideoError if its path is relative to a folder that no longer exists."""
        try:
            folder = None if os.path.isabs(self.path) else os.getcwd()
        except FileNotFoundError as error:
            raise VideoError(f"cannot read {self.path}: the current folder is gone", "go to another") from error
        return {"task": task, "folder": folder, "arguments": arguments}

    def ask_to_fill(self, memory: FrameMemory, shape: tuple[int, ...], more: dict[str, Any]) -> "np.ndarray":
        """Request the next frames, with `more` entries of the message: uint8 `[n, H, W, 3]`, filled when `answer` returns.

        Raises VideoError: a limit on the size of files forbids such memory. UsageError: too many open files. MemoryError.
        """
        try:
            frames, number, descriptor = memory.take(shape)
        except OSError as error:
            self.busy = True  # in the middle of a video, so the process cannot serve another one
            if error.errno == errno.EFBIG:
                message = "the limit on the size of files is below that of a few frames"
                raise VideoError(message, "ulimit -f unlimited") from error
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise process_error("share frames with the process that reads videos", error, "read") from error
            raise MemoryError(f"no memory for frames: {error.strerror}") from error
        try:
            self.send({"shape": shape, "piece": number, **more}, descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return frames

    def send(self, message: dict[str, Any], descriptor: int | None = None) -> None:
        """Send a request, which `answer` answers. Raises Crash."""
        self.busy = True
        try:
            self._channel.send(message, descriptor)
        except OSError as error:
            raise self._crash() from error

    def answer(self, on_frames: OnFrames | None = None) -> Any:
        """Return the result of the request. Raises what `run_task` raises, and Crash where that tries again.

        `on_frames`: called about each second with how many frames there are so far.
        """
        try:
            message, _ = self._channel.receive(SILENCE_S, on_frames)
        except TimeoutError as error:
            message = f"reading {self.path} has come to a standstill: nothing for {SILENCE_S:g} s"
            raise VideoError(message, HINT) from error
        except (OSError, EOFError, ValueError, RecursionError) as error:
            raise self._crash() from error
        self._answered = True
        # An earlier video in the same process may have taken the memory, so this is a crash: it is tried again.
        if limit := message.get("memory"):
            raise Crash(f"reading {self.path} takes more than {limit / 2**30:.1f} GiB of memory", HINT)
        self.busy = False
        if error := message.get("error"):
            raise ERRORS[error.pop("type")](**error)
        if bug := message.get("bug"):
            problem = RuntimeError(bug.splitlines()[-1])
            problem.add_note(bug)
            raise problem
        return message["result"]

    def _crash(self) -> Crash | OutOfMemory | Stopped:
        if self.stopped:
            return Stopped()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            hint = "close other programs, give the container more memory, or convert the video to a smaller size"
            return OutOfMemory(f"out of memory: the system ended the decoder of {self.path}", hint, stage="read")
        hint = HINT
        if code is None:
            end = "its answer is invalid"
        elif code < 0:
            end = signal.strsignal(-code)
        else:
            end = f"exit code {code}"
            if not self._answered:
                hint = f"{HINT}; or sys.executable, {sys.executable}, is not Python"
        problem = Crash(f"the decoder crashed on {self.path} ({end})", hint)
        problem.add_note(os.pread(self._stderr.fileno(), 2**16, 0).decode(errors="replace"))
        return problem

    def kill(self) -> None:
        """Kill the process, whatever it does; for another thread: whoever waits for an answer gets a `Crash`."""
        self._process.kill()

    def stop(self) -> None:
        """Kill the process, for another thread: whoever waits for an answer gets `Stopped`, also where a disk holds the process."""
        self.stopped = True
        self._channel.shut()
        self.kill()

    def end(self) -> None:
        """Kill the process, and forget it."""
        self.kill()
        self._process.stdin.close()
        self._channel.close()
        self._stderr.close()
        with suppress(subprocess.TimeoutExpired):  # a process that waits for a disk ends once the disk answers
            self._process.wait(1)


class InProcess:
    """Answer requests in this process, as a `WorkerProcess` does: each runs when `answer` asks for its result."""

    def __init__(self):
        from evoprune.video.sandbox.worker import Server

        self.path = ""
        self.busy = False
        self._server = Server()
        self._pending: Callable[[], Any] = lambda: None

    def request(self, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"task": task, "arguments": arguments}

    def ask_to_fill(self, memory: FrameMemory, shape: tuple[int, ...], more: dict[str, Any]) -> "np.ndarray":
        import numpy as np

        array = np.empty(shape, np.uint8)
        self._pending = partial(self._server.result, more, array)
        return array

    def send(self, message: dict[str, Any], descriptor: int | None = None) -> None:
        if descriptor is not None:
            message["arguments"] |= {"descriptor": os.dup(descriptor)}
        self._pending = partial(self._server.result, message)

    def answer(self, on_frames: OnFrames | None = None) -> Any:
        return self._pending()

    def kill(self) -> None:
        """Do nothing: a request that runs here cannot be ended."""

    def close(self) -> None:
        self._server.close()


_idle: list[WorkerProcess] = []
_lock = threading.RLock()  # memory may be cleaned up, which gives a process back, in whoever holds it
_most_idle = MAX_IDLE


@contextmanager
def keep_idle(count: int) -> Iterator[None]:
    """Keeps up to so many processes while the block runs, which reads as many videos at a time; afterwards `MAX_IDLE` again."""
    global _most_idle
    before = _most_idle
    _most_idle = max(before, count)
    try:
        yield
    finally:
        _most_idle = before
        with _lock:
            ended = _idle[before:]
            del _idle[before:]
        for worker in ended:
            worker.end()


class Scope:
    """Bound the reading of a thread, and of the threads that it starts: entered there, stopped from another thread.

    A thread inherits the scope of the one that starts it where `contextvars.copy_context().run` runs it.
    """

    def __init__(self):
        self._outer: Scope | None = None  # that of the thread that started those that have entered
        self._stopped = False
        self._workers: set[WorkerProcess] = set()

    def enter(self) -> None:
        """Have this thread read in this scope from now on, within the one that it inherits."""
        self._outer = _scope.get()
        _scope.set(self)

    @property
    def stopped(self) -> bool:
        """Return whether it was stopped, or the one around it."""
        return self._stopped or (self._outer is not None and self._outer.stopped)

    def stop(self) -> None:
        """End all reading at once: whoever waits for a worker process in this scope, or wants one, gets `Stopped`."""
        with _lock:
            self._stopped = True
            for worker in list(self._workers):
                worker.stop()

    @contextmanager
    def using(self, worker: WorkerProcess) -> Iterator[None]:
        """Has `stop` end a worker process during a block. Raises Stopped."""
        with _lock:
            if self._stopped:
                raise Stopped
            self._workers.add(worker)
        try:
            outer = self._outer.using(worker) if self._outer else nullcontext()
            with outer:
                yield
        finally:
            with _lock:
                self._workers.discard(worker)


_scope: ContextVar[Scope | None] = ContextVar("evoprune-scope", default=None)


def check_wanted() -> None:
    """Raises Stopped where nobody wants any more what this thread reads."""
    scope = _scope.get()
    if scope and scope.stopped:
        raise Stopped


def wait_for(changed: threading.Condition, true: Callable[[], Any], patience_s: float = math.inf) -> bool:
    """Waits for what another thread reads, with the lock of `changed`; whether it is true at the end. Raises Stopped."""
    end_s = time.monotonic() + patience_s
    while not changed.wait_for(true, min(LOOK_S, end_s - time.monotonic())):
        check_wanted()
        if time.monotonic() >= end_s:
            return False
    return True


def warm_up() -> None:
    """Start a process for the first video unless one is idle, without waiting for it. Where that fails, `borrow` raises later."""
    if POSSIBLE and not _idle:
        with suppress(OSError), _lock:
            _idle.append(WorkerProcess())


@contextmanager
def borrow(path: str) -> Iterator[WorkerProcess | InProcess]:
    """Provide a process for one video, idle or new. It is kept afterwards unless a request is unanswered; then it is ended.

    Where no process is `POSSIBLE`, requests are answered in this one.
    """
    if not POSSIBLE:
        with closing(InProcess()) as here:
            yield here
        return
    worker = None
    while worker is None:
        with _lock:
            if _idle:
                worker = _idle.pop()
        if worker is None:
            try:
                worker = WorkerProcess()
            except OSError as error:
                raise process_error("start the process that reads videos", error, "read") from error
        elif worker._process.poll() is not None:  # what ended one that idled is not the next video's fault
            worker.end()
            worker = None
    worker.path = path
    scope = _scope.get()
    try:
        using = scope.using(worker) if scope else nullcontext()
        with using:
            yield worker
    finally:
        with _lock:
            kept = not (worker.busy or worker.stopped) and len(_idle) < _most_idle
            if kept:
                _idle.append(worker)
        if not kept:
            worker.end()


@atexit.register
def end_all() -> None:
    """End the idle processes. Borrowed ones end with this process."""
    with _lock:
        ended = list(_idle)
        _idle.clear()
    for worker in ended:
        worker.end()


def _forget() -> None:
    """Forget the workers in a forked copy of this process: they belong to the original."""
    global _lock, _idle
    _lock = threading.RLock()
    _idle = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run_task(
    task: str, path: str, arguments: dict[str, Any], on_frames: OnFrames | None = None
) -> dict[str, Any] | None:
    """Return the result of one of `worker.TASKS` as plain data. `path` is the video's, for messages; `on_frames`: as of `answer`.

    Raises:
        VideoError: the process crashed or took too much memory, twice, or made no progress for `SILENCE_S`.
        OutOfMemory: there is none to start a process, or the system ended it. UsageError: no process can be started.
        What the task raises.
    """
    for again in (True, False):
        try:
            with borrow(path) as worker:
                worker.send(worker.request(task, arguments))
                return worker.answer(on_frames)
        except Crash:
            if not again:
                raise


def stream_frames(
    info: Video,
    times_s: Sequence[float],
    sizes: Sequence[int],
    how: dict[str, Any],
    on_frames: OnFrames = lambda frames: None,
) -> Iterator[FilledArray]:
    """Yield the frames on screen at given times, as `frames.read_chunks`, in arrays; raises what `run_task` raises.

    `how`: further arguments of `worker.FrameReader`.

    The worker fills one array while the caller uses the one before it, in memory that both processes share. `sizes` are the frames
    of each array, of which there is at least one; their sum is the number of times. `on_frames`: called about each second, by the
    thread that iterates, with how many frames there are so far, at least.
    """
    stream = partial(_stream_once, on_frames=on_frames)
    done = 0
    try:
        with closing(stream(info, times_s, sizes, how)) as arrays:
            for filled in arrays:
                done += 1
                yield filled
    except Crash:
        # All times again, because on all of them depends whether times are moved.
        with closing(stream(info, times_s, sizes, how)) as arrays:
            yield from islice(arrays, done, None)


def _stream_once(
    info: Video, times_s: Sequence[float], sizes: Sequence[int], how: dict[str, Any], on_frames: OnFrames
) -> Iterator[FilledArray]:
    shapes = [(size, info.height, info.width, 3) for size in sizes]
    memory = FrameMemory(max(map(prod, shapes)))
    there = 0  # frames in the arrays before the one that is being filled

    def count(frames: int) -> None:
        on_frames(there + frames)

    with borrow(info.path) as worker:
        begin = worker.request("frames", {"info": asdict(info), "times_s": list(times_s), **how})
        # One message opens the video and asks for its first array: a round trip costs as much as a small picture.
        coming = worker.ask_to_fill(memory, shapes[0], begin | {"last": len(shapes) == 1})
        for number, shape in enumerate(shapes[1:], 2):
            filled = coming, worker.answer(count)
            there += len(coming)
            del coming  # so that only the caller holds the array, and its memory can be reused once the caller drops it
            coming = worker.ask_to_fill(memory, shape, {"last": number == len(shapes)})
            yield filled
            del filled
        filled = coming, worker.answer(count)
        del coming
    yield filled


def stream_clip(info: Video, how: dict[str, Any]) -> Iterator[dict[str, Any] | tuple[int, memoryview]]:
    """Yield the facts of a `cutting.ClipReader`, then pieces of the clip: the place of each in its file, which lies no further than
    those before reach, and the bytes.

    `how`: further arguments of `ClipReader`. Raises what `run_task` raises. A crash is not tried again: the caller can write anew.
    """
    with closing(_clip_pieces(info, how)) as pieces:
        yield next(pieces)
        size = 0
        for at, content in pieces:
            if not 0 <= at <= size:
                raise Crash(f"the decoder crashed on {info.path} (its answer is invalid)", HINT)
            size = max(size, at + len(content))
            yield at, content


def _clip_pieces(info: Video, how: dict[str, Any]) -> Iterator[dict[str, Any] | tuple[int, memoryview]]:
    memory = FrameMemory(
        2 * CLIP_PIECE
    )  # so much that each piece has memory of its own, which the process then forgets
    with borrow(info.path) as worker:
        worker.send(worker.request("clip", {"info": asdict(info), **how}))
        yield worker.answer()
        done = False
        while not done:
            content = worker.ask_to_fill(memory, (CLIP_PIECE,), {})
            said = worker.answer()
            done = said["done"]
            worker.busy = not done  # so that the process ends where the clip is not wanted any more
            yield said["at"], content.data[: said["bytes"]]
