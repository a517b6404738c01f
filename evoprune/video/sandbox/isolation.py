"""Runs tasks and streams frames in worker processes, each of which reads one video at a time.

If a worker crashes or exceeds its memory limit, the request is retried once in a new process, because an earlier video may be the
cause. A second failure is blamed on the video. A worker that hangs is killed, and its request is not retried.
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
from evoprune.backend import Host
from evoprune.errors import OutOfMemory, UsageError, VideoError, process_error
from evoprune.video.info import Video
from evoprune.video.sandbox.channel import Channel, FrameMemory

if TYPE_CHECKING:
    import numpy as np

MAX_IDLE = 2  # worker processes kept for later videos
SILENCE_S = 25.0  # a worker that reports no progress for this long counts as hung
CLIP_PIECE = 2**20  # bytes of a clip per answer
POLL_S = 0.1  # interval at which a waiting thread checks whether its result is still wanted
# Other systems run everything in this process and trust FFmpeg. Frozen programs do too: their executable is not Python.
POSSIBLE = sys.platform == "linux" and bool(sys.executable) and not hasattr(sys, "frozen")
FilledArray = tuple["np.ndarray", dict[str, Any]]  # uint8 [n, H, W, 3], and what `worker.FrameReader.fill` returns
OnFrames = Callable[[int], None]
# The code that a worker process runs. It imports from the same paths as this process.
PROGRAM = "import sys; sys.path[:] = {paths}; from evoprune.video.sandbox.worker import main; main({socket})"
ERRORS = {error.type: error for error in (UsageError, VideoError, OutOfMemory)}
HINT = "it is damaged or malicious; if it plays elsewhere, convert it, e.g. with ffmpeg"


class Crash(VideoError):
    """Raised when a worker process has ended or can no longer be used."""


class Stopped(Exception):
    """Raised in reading threads after `Scope.stop`, because their results are no longer wanted."""


class WorkerProcess:
    """A process that reads videos, one request at a time.

    Attributes:
        path: name of the video in error messages.
        busy: True while a request is unanswered, or the process is in the middle of a video.
        stopped: True after `stop`.
    """

    def __init__(self):
        self.path = ""
        self.busy = False
        self._answered = False
        self._oom_kills = Host().oom_kills()
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
                stdin=subprocess.PIPE,  # closes when this process ends, which ends the worker
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # otherwise numpy starts threads without need
                pass_fds=[there.fileno()],
                start_new_session=True,  # Ctrl-C must reach only this process
            )
        self.pid = self._process.pid

    def request(self, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Build the message that requests a task. Raises VideoError if a relative path has no current folder."""
        try:
            folder = None if os.path.isabs(self.path) else os.getcwd()
        except FileNotFoundError as error:
            raise VideoError(
                f"cannot read {self.path}: the current folder no longer exists", "change to another folder"
            ) from error
        return {"task": task, "folder": folder, "arguments": arguments}

    def ask_to_fill(self, memory: FrameMemory, shape: tuple[int, ...], more: dict[str, Any]) -> "np.ndarray":
        """Request the next frames, or bytes of a clip.

        Args:
            shape: `(n, H, W, 3)` for frames, `(n,)` for bytes.
            more: further entries of the message.

        Returns:
            A uint8 array of that shape in shared memory. Its contents are valid once `answer` returns.

        Raises:
            VideoError: the system's limit on file sizes is too low for the shared memory.
            UsageError: too many open files.
            MemoryError: there is not enough memory.
        """
        try:
            frames, number, descriptor = memory.take(shape)
        except OSError as error:
            self.busy = True  # the process is in the middle of a video, so it cannot serve another one
            if error.errno == errno.EFBIG:
                message = "the file size limit is too low for a few frames"
                raise VideoError(message, "raise it: ulimit -f unlimited") from error
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
        """Send a request; `answer` returns its result. Raises Crash, OutOfMemory or Stopped if the process has ended."""
        self.busy = True
        try:
            self._channel.send(message, descriptor)
        except OSError as error:
            raise self._crash() from error

    def answer(self, on_frames: OnFrames | None = None) -> Any:
        """Wait for the result of the request and return it.

        Args:
            on_frames: called about once a second with the number of frames read so far.

        Raises:
            Crash: the process crashed or exceeded its memory limit. `run_task` retries then.
            Stopped: another thread called `stop`.
            VideoError, OutOfMemory, UsageError: see `run_task`.
        """
        try:
            message, _ = self._channel.receive(SILENCE_S, on_frames)
        except TimeoutError as error:
            message = f"reading {self.path} is stuck: no progress for {SILENCE_S:g} s"
            raise VideoError(message, HINT) from error
        except (OSError, EOFError, ValueError, RecursionError) as error:
            raise self._crash() from error
        self._answered = True
        # An earlier video may have taken the memory of this process. Counting this as a crash makes `run_task` retry.
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
        if code == -signal.SIGKILL and Host().oom_kills() > self._oom_kills:
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
        """Kill the process. Other threads may call this; a thread that waits in `answer` gets a `Crash`."""
        self._process.kill()

    def stop(self) -> None:
        """Kill the process from another thread. `answer` raises `Stopped` at once, even if the process is blocked by a disk."""
        self.stopped = True
        self._channel.shut()
        self.kill()

    def end(self) -> None:
        """Kill the process and release its resources."""
        self.kill()
        self._process.stdin.close()
        self._channel.close()
        self._stderr.close()
        with suppress(subprocess.TimeoutExpired):  # a process blocked by a disk ends once the disk answers
            self._process.wait(1)


class InProcess:
    """Stand-in for `WorkerProcess` that runs requests in this process, when `answer` is called."""

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
        """Do nothing, because a request in this process cannot be killed."""

    def close(self) -> None:
        self._server.close()


_idle: list[WorkerProcess] = []
_lock = threading.RLock()  # reentrant: garbage collection may return a process while its thread holds the lock
_max_idle = MAX_IDLE


@contextmanager
def keep_idle(count: int) -> Iterator[None]:
    """Keep up to `count` idle processes during a block that reads this many videos at a time. Restores the limit afterwards."""
    global _max_idle
    before = _max_idle
    _max_idle = max(before, count)
    try:
        yield
    finally:
        _max_idle = before
        with _lock:
            ended = _idle[before:]
            del _idle[before:]
        for worker in ended:
            worker.end()


class Scope:
    """Cancellation scope for the reading that a thread and its child threads do. Another thread stops it.

    A child thread inherits the scope if it runs in `contextvars.copy_context().run`.
    """

    def __init__(self):
        self._outer: Scope | None = None  # scope inherited from the thread that started the one that entered
        self._stopped = False
        self._workers: set[WorkerProcess] = set()

    def enter(self) -> None:
        """Make this the scope of the current thread, nested in the scope that the thread inherited."""
        self._outer = _scope.get()
        _scope.set(self)

    @property
    def stopped(self) -> bool:
        """True if this scope or an outer one was stopped."""
        return self._stopped or (self._outer is not None and self._outer.stopped)

    def stop(self) -> None:
        """Stop all reading in this scope at once. Threads that wait for a worker process, or ask for one, get `Stopped`."""
        with _lock:
            self._stopped = True
            for worker in list(self._workers):
                worker.stop()

    @staticmethod
    def check() -> None:
        """Raise Stopped if the scope of the current thread was stopped."""
        scope = _scope.get()
        if scope and scope.stopped:
            raise Stopped

    @staticmethod
    def wait_for(changed: threading.Condition, condition: Callable[[], Any], patience_s: float = math.inf) -> bool:
        """Wait until a condition becomes true in another thread. The caller holds the lock of `changed`.

        Args:
            condition: called with the lock held.
            patience_s: timeout in seconds.

        Returns:
            True if the condition holds, False after a timeout.

        Raises:
            Stopped: the scope of the current thread was stopped.
        """
        end_s = time.monotonic() + patience_s
        while not changed.wait_for(condition, min(POLL_S, end_s - time.monotonic())):
            Scope.check()
            if time.monotonic() >= end_s:
                return False
        return True

    @contextmanager
    def using(self, worker: WorkerProcess) -> Iterator[None]:
        """Let `stop` kill a worker process during a block. Raises Stopped if the scope was stopped before."""
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


def warm_up() -> None:
    """Start a process for the first video without waiting for it, unless one is idle. Errors are left for `borrow` to raise."""
    if POSSIBLE and not _idle:
        with suppress(OSError), _lock:
            _idle.append(WorkerProcess())


@contextmanager
def borrow(path: str) -> Iterator[WorkerProcess | InProcess]:
    """Yield an idle or new process for one video.

    Afterwards the process becomes idle, or is killed if a request is unanswered, it was stopped, or enough others are idle. If
    worker processes are not `POSSIBLE`, the requests run in this process.
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
        elif worker._process.poll() is not None:  # ended while idle, so not because of this video
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
            kept = not (worker.busy or worker.stopped) and len(_idle) < _max_idle
            if kept:
                _idle.append(worker)
        if not kept:
            worker.end()


@atexit.register
def end_all() -> None:
    """Kill the idle processes. Borrowed ones end with this process."""
    with _lock:
        ended = list(_idle)
        _idle.clear()
    for worker in ended:
        worker.end()


def _forget() -> None:
    """Forget the workers in a forked child, because they belong to its parent."""
    global _lock, _idle
    _lock = threading.RLock()
    _idle = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run_task(
    task: str, path: str, arguments: dict[str, Any], on_frames: OnFrames | None = None
) -> dict[str, Any] | None:
    """Run one of `worker.TASKS` in a worker process and return its result as plain data.

    Args:
        path: path of the video, for error messages.
        on_frames: see `WorkerProcess.answer`.

    Raises:
        VideoError: the process crashed or exceeded its memory limit twice, or made no progress for `SILENCE_S`; or the task
            raised it.
        OutOfMemory: no memory to start a process, or the system killed it for lack of memory.
        UsageError: no process can be started; or the task raised it.
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
    """Yield the frames on screen at given times in arrays, see `frames.read_chunks`. Raises what `run_task` raises.

    The worker fills one array in shared memory while the caller uses the one before it.

    Args:
        sizes: number of frames per array, at least one array. Their sum is the number of times.
        how: further arguments of `worker.FrameReader`.
        on_frames: called about once a second, by the iterating thread, with a lower bound on the number of frames read so far.
    """
    stream = partial(_stream_once, on_frames=on_frames)
    done = 0
    try:
        with closing(stream(info, times_s, sizes, how)) as arrays:
            for filled in arrays:
                done += 1
                yield filled
    except Crash:
        # Request all times again, because whether times are moved to keyframes depends on all of them.
        with closing(stream(info, times_s, sizes, how)) as arrays:
            yield from islice(arrays, done, None)


def _stream_once(
    info: Video, times_s: Sequence[float], sizes: Sequence[int], how: dict[str, Any], on_frames: OnFrames
) -> Iterator[FilledArray]:
    shapes = [(size, info.height, info.width, 3) for size in sizes]
    memory = FrameMemory(max(map(prod, shapes)))
    frames_filled = 0  # frames in the arrays that are already filled

    def count(frames: int) -> None:
        on_frames(frames_filled + frames)

    with borrow(info.path) as worker:
        begin = worker.request("frames", {"info": asdict(info), "times_s": list(times_s), **how})
        # One message opens the video and requests its first array, because a round trip costs as much as a small picture.
        next_array = worker.ask_to_fill(memory, shapes[0], begin | {"last": len(shapes) == 1})
        for number, shape in enumerate(shapes[1:], 2):
            filled = next_array, worker.answer(count)
            frames_filled += len(next_array)
            del (
                next_array
            )  # leaves the caller as the only owner, so the memory is reused once the caller drops the array
            next_array = worker.ask_to_fill(memory, shape, {"last": number == len(shapes)})
            yield filled
            del filled
        filled = next_array, worker.answer(count)
        del next_array
    yield filled


def stream_clip(info: Video, how: dict[str, Any]) -> Iterator[dict[str, Any] | tuple[int, memoryview]]:
    """Yield the facts of a `cutting.ClipReader`, then the pieces of the clip as (offset in the clip's file, bytes).

    An offset never lies beyond the end of the earlier pieces, so the file has no holes.

    Args:
        how: further arguments of `ClipReader`.

    Raises:
        VideoError, OutOfMemory, UsageError: see `run_task`. Crashes are not retried; the caller can start over.
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
    # With twice the size of a piece, every piece gets memory of its own, which the worker releases after use.
    memory = FrameMemory(2 * CLIP_PIECE)
    with borrow(info.path) as worker:
        worker.send(worker.request("clip", {"info": asdict(info), **how}))
        yield worker.answer()
        done = False
        while not done:
            content = worker.ask_to_fill(memory, (CLIP_PIECE,), {})
            written = worker.answer()
            done = written["done"]
            worker.busy = not done  # so `borrow` kills the process if the caller stops early
            yield written["at"], content.data[: written["bytes"]]
