"""Runs tasks in worker processes and streams frames from them. Each worker process reads one video at a time.

If a worker crashes or exceeds its memory limit, the request is retried once in a new process, because an earlier video may have
caused the failure. If the retry also fails, the error message blames the video. A hung worker is killed, and its request is not
retried.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import evoprune
from evoprune.backend import Host
from evoprune.errors import OutOfMemory, UsageError, VideoError, process_error
from evoprune.untrusted import worker_environment
from evoprune.video.info import Video
from evoprune.video.sandbox.channel import Channel, FrameMemory, Heartbeat

if TYPE_CHECKING:
    import numpy as np

MAX_IDLE = 2  # number of idle worker processes to keep for subsequent videos
SILENCE_S = 25.0  # a worker that reports no progress for this long is considered to be hung
CLIP_PIECE = 2**20  # maximum number of clip bytes per answer
POLL_S = 0.1  # interval at which a waiting thread checks whether its result is still needed
# Worker processes are used only on Linux. On other systems, everything runs in the current process, and FFmpeg has to be trusted.
# The same applies to frozen programs, because their executable is not Python.
POSSIBLE = sys.platform == "linux" and bool(sys.executable) and not hasattr(sys, "frozen")
FilledArray = tuple["np.ndarray", dict[str, Any]]  # uint8 [n, H, W, 3], and the result of `worker.FrameReader.fill`
T = TypeVar("T")
# The program that a worker process runs. It uses the same import paths as this process.
PROGRAM = "import sys; sys.path[:] = {paths}; from evoprune.video.sandbox.worker import main; main({socket})"
ERRORS = {error.type: error for error in (UsageError, VideoError, OutOfMemory)}
HINT = "it is damaged or malicious; if it plays elsewhere, convert it, e.g. with ffmpeg"


class Crash(VideoError):
    """Raised if a worker process exits unexpectedly or can no longer be used."""


class Stopped(Exception):
    """Raised in threads that are reading videos after `Scope.stop` has been called, because their results are no longer needed."""


class WorkerProcess:
    """A process that reads videos. `borrow` lends it for one `Request` at a time.

    Args:
        variables: Environment variables in addition to `worker_environment`.
    """

    def __init__(self, variables: Mapping[str, str] = MappingProxyType({})):
        here, there = socket.socketpair()
        here.settimeout(SILENCE_S)
        self._channel = Channel(here)
        self._answered = False
        self._oom_kills = Host().oom_kills()
        self._stderr = os.fdopen(os.memfd_create("evoprune-stderr"), "rb", buffering=0)
        # Editable installs are found through an import hook. The worker doesn't have this hook, so it needs the package's parent
        # folder.
        paths = [*map(os.path.abspath, sys.path), str(Path(evoprune.__file__).parents[1])]
        program = PROGRAM.format(paths=list(dict.fromkeys(paths)), socket=there.fileno())
        with there:
            self._process = subprocess.Popen(  # noqa: S603 (runs this Python with our own program)
                # -S skips `site`, which only sets paths that PROGRAM sets anyway.
                [sys.executable, "-I", "-S", f"-Xutf8={sys.flags.utf8_mode}", "-c", program],
                stdin=subprocess.PIPE,  # closed when this process exits, which causes the worker to exit
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                # Without this limit, NumPy would start unneeded threads.
                env={**worker_environment(), **variables, "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=[there.fileno()],
                start_new_session=True,  # Ctrl-C must only reach this process
            )
        self.pid = self._process.pid

    @property
    def has_exited(self) -> bool:
        return self._process.poll() is not None

    def send(self, message: dict[str, Any], descriptor: int | None) -> None:
        """Send a message. Raises OSError if the process has exited, or VideoError if the message is too long."""
        self._channel.send(message, descriptor)

    def receive(self) -> dict[str, Any] | Heartbeat:
        """Wait for an answer or a heartbeat. Raises TimeoutError after `SILENCE_S`, and the errors of `Channel.receive`."""
        message, _ = self._channel.receive(SILENCE_S)
        self._answered |= isinstance(message, dict)
        return message

    def crash(self, path: str) -> Crash | OutOfMemory:
        """Return the error for a process that has exited or sent an invalid answer while it was reading the video at `path`."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        if code == -signal.SIGKILL and Host().oom_kills() > self._oom_kills:
            hint = "close other programs, give the container more memory, or convert the video to a smaller size"
            return OutOfMemory(f"out of memory: the system ended the decoder of {path}", hint, stage="read")
        hint = HINT
        if code is None:
            end = "its answer is invalid"
        elif code < 0:
            end = signal.strsignal(-code)
        else:
            end = f"exit code {code}"
            if not self._answered:
                hint = f"{HINT}; or sys.executable, {sys.executable}, is not Python"
        problem = Crash(f"the decoder crashed on {path} ({end})", hint)
        problem.add_note(os.pread(self._stderr.fileno(), 2**16, 0).decode(errors="replace"))
        return problem

    def kill(self) -> None:
        """Kill the process. A thread that waits for an answer gets the error of `crash`."""
        self._process.kill()

    def stop(self) -> None:
        """Kill the process and end a wait for its answer at once, even while the process is blocked by disk I/O."""
        self._channel.shut()
        self.kill()

    def end(self) -> None:
        """Kill the process and release the resources used for communication."""
        self.kill()
        self._process.stdin.close()
        self._channel.close()
        self._stderr.close()
        with suppress(subprocess.TimeoutExpired):  # a process blocked by disk I/O exits only when the I/O completes
            self._process.wait(1)


class Request:
    """A request to a worker process, which handles nothing else until the request ends. Created by `borrow`.

    A request ends when the task raises an error, or when the caller calls `finish`.

    Args:
        process: The process.
        path: Path of the video, used in error messages.
    """

    def __init__(self, process: WorkerProcess, path: str):
        self.process = process
        self.path = path
        self.is_finished = False
        self._stopped = False

    def ask(self, task: str, descriptor: int | None = None, **arguments: Any) -> Any:
        """Start a task, wait for its result, and return it.

        Args:
            task: A task of the worker process (see `worker`).
            descriptor: A file descriptor to send to the process.
            arguments: Arguments of the task.

        Raises:
            VideoError: The path is relative and the current folder no longer exists. See also `replies`.
        """
        self._send(self._message(task, arguments), descriptor)
        return self._answer()

    def ask_slowly(self, task: str, **arguments: Any) -> Iterator[Any]:
        """Start a task and yield its `replies`. Raises the same errors as `ask`."""
        self._send(self._message(task, arguments))
        yield from self.replies()

    def fill(self, memory: FrameMemory, shape: tuple[int, ...]) -> tuple["np.ndarray", Any]:
        """Return an array with the next contents, and the process's facts about them. Raises the errors of `ask_to_fill`."""
        array = self.ask_to_fill(memory, shape)
        return array, self._answer()

    def ask_to_fill(
        self,
        memory: FrameMemory,
        shape: tuple[int, ...],
        *,
        last: bool = False,
        task: str | None = None,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> "np.ndarray":
        """Ask the process to fill an array with the next frames, samples, or bytes.

        Args:
            memory: Shared memory from which to take the array.
            shape: `(n, H, W, 3)` for frames, `(n,)` for bytes.
            last: Whether this is the last array of frames.
            task: A task to start first. A message of its own would take as long as reading a small image.
            arguments: The arguments of this task.

        Returns:
            A uint8 array in shared memory, with the given shape. The contents are valid only after `replies` has ended.

        Raises:
            VideoError: The system's file size limit is too low for the shared memory. See also `replies`.
            UsageError: Too many files are open.
            MemoryError: There is not enough memory.
        """
        message = self._message(task, arguments) if task else {}
        try:
            array, number, descriptor = memory.take(shape)
        except OSError as error:
            if error.errno == errno.EFBIG:
                message = "the file size limit is too low for a few frames"
                raise VideoError(message, "raise it: ulimit -f unlimited") from error
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise process_error("share frames with the process that reads videos", error, "read") from error
            raise MemoryError(f"no memory for frames: {error.strerror}") from error
        try:
            self._send({"shape": shape, "piece": number, "last": last, **message}, descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return array

    def replies(self) -> Iterator[Any]:
        """Yield about one `Heartbeat` a second until the process has an answer, and then the answer.

        Raises:
            Crash: The process crashed or exceeded its memory limit. `with_retry` catches this error and starts over once.
            Stopped: Another thread called `stop`.
            VideoError, OutOfMemory, UsageError: See `run_task`.
        """
        while isinstance(message := self._receive(), Heartbeat):
            yield message
        yield self._result(message)

    def finish(self) -> None:
        """End the request, so that the process can be used for others."""
        self.is_finished = True

    def kill(self) -> None:
        """Kill the process. May be called from any thread. If a thread is waiting for an answer, Crash is raised there."""
        self.process.kill()

    def stop(self) -> None:
        """Kill the process. May be called from any thread. If a thread is waiting for an answer, Stopped is raised there."""
        self._stopped = True
        self.process.stop()

    def _message(self, task: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            folder = None if os.path.isabs(self.path) else os.getcwd()
        except FileNotFoundError as error:
            raise VideoError(
                f"cannot read {self.path}: the current folder no longer exists", "change to another folder"
            ) from error
        return {"task": task, "folder": folder, "arguments": dict(arguments)}

    def _send(self, message: dict[str, Any], descriptor: int | None = None) -> None:
        try:
            self.process.send(message, descriptor)
        except OSError as error:
            raise self._crash() from error

    def _answer(self) -> Any:
        *_, result = self.replies()
        return result

    def _receive(self) -> dict[str, Any] | Heartbeat:
        try:
            return self.process.receive()
        except TimeoutError as error:
            message = f"reading {self.path} is stuck: no progress for {SILENCE_S:g} s"
            raise VideoError(message, HINT) from error
        except (OSError, EOFError, ValueError, RecursionError) as error:
            raise self._crash() from error

    def _result(self, message: dict[str, Any]) -> Any:
        # An earlier video may have exhausted this process's memory. Raising Crash causes a retry in a new process.
        if limit := message.get("memory"):
            raise Crash(f"reading {self.path} takes more than {limit / 2**30:.1f} GiB of memory", HINT)
        if error := message.get("error"):
            self.finish()
            raise ERRORS[error.pop("type")](**error)
        if bug := message.get("bug"):
            self.finish()
            problem = RuntimeError(bug.splitlines()[-1])
            problem.add_note(bug)
            raise problem
        return message["result"]

    def _crash(self) -> Crash | OutOfMemory | Stopped:
        return Stopped() if self._stopped else self.process.crash(self.path)


class InProcess(Request):
    """A `Request` that is handled in the current process, when its result is needed. It cannot be killed."""

    def __init__(self, path: str):
        from evoprune.video.sandbox.worker import Server

        self.path = path
        self.is_finished = False
        self._server = Server()
        self._pending: Callable[[], Any] = lambda: None

    def ask_to_fill(self, memory, shape, *, last=False, task=None, arguments=MappingProxyType({})) -> "np.ndarray":
        import numpy as np

        array = np.empty(shape, np.uint8)
        message = {"task": task, "arguments": dict(arguments)} if task else {}
        self._pending = partial(self._server.result, message, array)
        return array

    def replies(self) -> Iterator[Any]:
        yield self._pending()

    def kill(self) -> None:
        """Do nothing."""

    def _send(self, message: dict[str, Any], descriptor: int | None = None) -> None:
        if descriptor is not None:
            message["arguments"]["descriptor"] = os.dup(descriptor)
        self._pending = partial(self._server.result, message)

    def close(self) -> None:
        self._server.close()


_idle: list[WorkerProcess] = []
# The lock is reentrant, because a garbage-collected iterator may return its process while the same thread holds the lock.
_lock = threading.RLock()
# Limits on idle processes set by the `keep_idle` blocks that are currently running. Each block has its own key.
_idle_limits: dict[object, int] = {}


@contextmanager
def keep_idle(count: int) -> Iterator[None]:
    """Allow `count` idle processes during a `with` block that reads up to `count` videos in parallel.

    If several blocks run at the same time, their counts are added. When a block ends, idle processes above the new limit are
    killed.
    """
    block = object()
    with _lock:
        _idle_limits[block] = count
    try:
        yield
    finally:
        with _lock:
            _idle_limits.pop(block, None)  # missing in a forked child process
            limit = _max_idle()
            ended = _idle[limit:]
            del _idle[limit:]
        for worker in ended:
            worker.end()


def _max_idle() -> int:
    return max(MAX_IDLE, sum(_idle_limits.values()))


class Scope:
    """A cancellation scope that lets another thread stop all reading in a thread and its child threads.

    A child thread inherits the scope if it is started with `contextvars.copy_context().run`.
    """

    def __init__(self):
        self._outer: Scope | None = None  # enclosing scope inherited by the current thread
        self._stopped = False
        self._requests: set[Request] = set()

    def enter(self) -> None:
        """Make this the current thread's scope, nested in any scope that the thread inherited."""
        self._outer = _scope.get()
        _scope.set(self)

    @property
    def stopped(self) -> bool:
        """True if this scope or an enclosing scope has been stopped."""
        return self._stopped or (self._outer is not None and self._outer.stopped)

    def stop(self) -> None:
        """Stop all reading in this scope immediately. Stopped is raised in any thread that uses or requests a worker process."""
        with _lock:
            self._stopped = True
            for request in list(self._requests):
                request.stop()

    @staticmethod
    def check() -> None:
        """Raise Stopped if the current thread's scope has been stopped."""
        scope = _scope.get()
        if scope and scope.stopped:
            raise Stopped

    @staticmethod
    def wait_for(changed: threading.Condition, condition: Callable[[], Any], patience_s: float = math.inf) -> bool:
        """Wait until another thread makes a condition true. The caller must hold the lock of `changed`.

        Args:
            changed: Condition variable that is notified when the condition may have become true.
            condition: Function that evaluates the condition. It is called with the lock held.
            patience_s: Timeout in seconds.

        Returns:
            True if the condition became true, or False after a timeout.

        Raises:
            Stopped: The current thread's scope has been stopped.
        """
        end_s = time.monotonic() + patience_s
        while not changed.wait_for(condition, min(POLL_S, end_s - time.monotonic())):
            Scope.check()
            if time.monotonic() >= end_s:
                return False
        return True

    @contextmanager
    def using(self, request: Request) -> Iterator[None]:
        """Allow `stop` to stop a request during a `with` block. Raises Stopped if the scope has already been stopped."""
        with _lock:
            if self._stopped:
                raise Stopped
            self._requests.add(request)
        try:
            outer = self._outer.using(request) if self._outer else nullcontext()
            with outer:
                yield
        finally:
            with _lock:
                self._requests.discard(request)


_scope: ContextVar[Scope | None] = ContextVar("evoprune-scope", default=None)


def warm_up() -> None:
    """Start a process for the first video in the background, unless an idle process exists. Any errors are reported by `borrow`."""
    if POSSIBLE and not _idle:
        with suppress(OSError), _lock:
            _idle.append(WorkerProcess())


@contextmanager
def borrow(path: str, fresh: bool = False, variables: Mapping[str, str] | None = None) -> Iterator[Request]:
    """Yield a request to a worker process for reading one video, reusing an idle process if possible.

    On exit, the process becomes idle again if the request is finished and there aren't enough idle processes already. Otherwise, it
    is killed. If worker processes are not `POSSIBLE`, requests run in the current process.

    Args:
        path: Path of the video, for error messages.
        fresh: Whether to start a new process.
        variables: Additional environment variables for a new process. The caller must not finish this request.
    """
    if not POSSIBLE:
        with closing(InProcess(path)) as request:
            yield request
        return
    process = None
    if not (fresh or variables):
        process = _idle_process()
    if process is None:
        try:
            process = WorkerProcess(variables) if variables else WorkerProcess()
        except OSError as error:
            raise process_error("start the process that reads videos", error, "read") from error
    request = Request(process, path)
    scope = _scope.get()
    try:
        using = scope.using(request) if scope else nullcontext()
        with using:
            yield request
    finally:
        with _lock:
            kept = request.is_finished and len(_idle) < _max_idle()
            if kept:
                _idle.append(process)
        if not kept:
            process.end()


def _idle_process() -> WorkerProcess | None:
    """Return an idle process, which is no longer idle then, or None. Processes that exited while idle are discarded."""
    while True:
        with _lock:
            if not _idle:
                return None
            process = _idle.pop()
        if not process.has_exited:
            return process
        process.end()


@atexit.register
def end_all() -> None:
    """Kill all idle worker processes. Processes in use exit together with the current process."""
    with _lock:
        ended = list(_idle)
        _idle.clear()
    for worker in ended:
        worker.end()


def _forget() -> None:
    """Forget all worker processes. Called in forked child processes, because the worker processes belong to the parent."""
    global _lock, _idle, _idle_limits
    _lock = threading.RLock()
    _idle = []
    _idle_limits = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run_task(
    task: str, path: str, arguments: dict[str, Any], on_frames: Callable[[int], None] | None = None
) -> dict[str, Any] | None:
    """Run a task from `worker.TASKS` in a worker process and return the result as a dict, or None if there is no result.

    Args:
        task: Name of the task.
        path: Path of the video, for error messages.
        arguments: Keyword arguments for the task.
        on_frames: Called about once a second with the number of frames read so far. If it raises an exception, the process is
            killed.

    Raises:
        VideoError: The process crashed or exceeded its memory limit twice, or reported no progress for `SILENCE_S`; or the task
            raised VideoError.
        OutOfMemory: There was not enough memory to start a process, or the system killed the process because it ran out of memory.
        UsageError: No process can be started, or the task raised UsageError.
    """

    def replies(fresh: bool) -> Iterator[Any]:
        with borrow(path, fresh) as request:
            for reply in request.ask_slowly(task, **arguments):
                if not isinstance(reply, Heartbeat):
                    request.finish()
                yield reply

    with closing(with_retry(replies)) as both:
        for reply in both:
            if not isinstance(reply, Heartbeat):
                return reply
            if on_frames:
                on_frames(reply.done)


def with_retry(attempt: Callable[[bool], Iterator[T]]) -> Iterator[Heartbeat | T]:
    """Yield the replies of an attempt. If its process crashes, start over once, and skip the results that were already yielded.

    The caller passes heartbeats on to callbacks. This function must not call any, because it could not tell their exceptions from
    a crash.

    Args:
        attempt: A function that yields heartbeats and results. Its argument is True if it has to start a new process, because an
            earlier video may have caused the crash.
    """
    done = 0
    for again in (False, True):
        skipped = done
        try:
            with closing(attempt(again)) as replies:
                for reply in replies:
                    if isinstance(reply, Heartbeat):
                        yield reply
                    elif skipped:
                        skipped -= 1
                    else:
                        done += 1
                        yield reply
                    del reply  # drop this reference, so that the memory is reused once the caller drops its own
            return
        except Crash:
            if again:
                raise


def stream_frames(
    info: Video,
    times_s: Sequence[float],
    sizes: Sequence[int],
    how: dict[str, Any],
    on_frames: Callable[[int], None] = lambda frames: None,
) -> Iterator[FilledArray]:
    """Yield arrays of the frames on screen at the requested times (see `frames.read_chunks`).

    While the caller is using an array, the worker fills the next array in shared memory. Raises the same errors as `run_task`.

    Args:
        sizes: Number of frames in each array. There must be at least one array, and the sizes must add up to the number of
            requested times.
        how: Additional keyword arguments for `worker.FrameReader`.
        on_frames: Called about once a second, from the thread that iterates, with a lower bound on the number of frames read so
            far.
    """
    # A retry requests all times again, because the choice between exact frames and keyframes depends on all times.
    with closing(with_retry(partial(_stream_once, info, times_s, sizes, how))) as replies:
        for reply in replies:
            if isinstance(reply, Heartbeat):
                on_frames(reply.done)
            else:
                yield reply
            del reply  # drop this reference, so that the memory is reused once the caller drops its own


def _stream_once(
    info: Video, times_s: Sequence[float], sizes: Sequence[int], how: dict[str, Any], fresh: bool
) -> Iterator[Heartbeat | FilledArray]:
    shapes = [(size, info.height, info.width, 3) for size in sizes]
    memory = FrameMemory(max(map(prod, shapes)))
    frames_filled = 0  # total number of frames in the filled arrays
    with borrow(info.path, fresh) as request:
        begin = {"info": asdict(info), "times_s": list(times_s), **how}
        next_array = request.ask_to_fill(memory, shapes[0], last=len(shapes) == 1, task="frames", arguments=begin)
        for number in range(1, len(shapes) + 1):
            for reply in request.replies():
                if isinstance(reply, Heartbeat):
                    yield Heartbeat(frames_filled + reply.done)
            filled = next_array, reply
            frames_filled += len(next_array)
            next_array = None
            if number < len(shapes):
                next_array = request.ask_to_fill(memory, shapes[number], last=number + 1 == len(shapes))
                yield filled
                filled = None  # drop this reference, so that the memory is reused once the caller drops its own
        request.finish()
    yield filled


def stream_clip(
    info: Video, how: dict[str, Any], fresh: bool = False
) -> Iterator[dict[str, Any] | tuple[int, memoryview]]:
    """Cut a clip in a worker process. Yields the `facts` of the `cutting.ClipReader`, and then the clip's contents in pieces.

    Each piece is a tuple (file offset, bytes). Pieces may overwrite earlier bytes, but they never leave a hole in the file.

    Args:
        how: Additional keyword arguments for `ClipReader`.
        fresh: Whether to start a new process.

    Raises:
        VideoError, OutOfMemory, UsageError: See `run_task`. Unlike `run_task`, this function does not retry after a crash, so the
            caller has to call it again.
    """
    with closing(_clip_pieces(info, how, fresh)) as pieces:
        yield next(pieces)
        size = 0
        for at, content in pieces:
            if not 0 <= at <= size:
                raise Crash(f"the decoder crashed on {info.path} (its answer is invalid)", HINT)
            size = max(size, at + len(content))
            yield at, content


def _clip_pieces(info: Video, how: dict[str, Any], fresh: bool) -> Iterator[dict[str, Any] | tuple[int, memoryview]]:
    # Declare twice the actual size so that each piece gets its own memory, which the worker releases after use.
    memory = FrameMemory(2 * CLIP_PIECE)
    with borrow(info.path, fresh) as request:
        yield request.ask("clip", info=asdict(info), **how)
        done = False
        while not done:
            content, written = request.fill(memory, (CLIP_PIECE,))
            done = written["done"]
            yield written["at"], content.data[: written["bytes"]]
        request.finish()
