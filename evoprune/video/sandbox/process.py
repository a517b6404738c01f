"""One worker process, as the process that started it sees it: starting it, asking it, taking its answers."""

import errno
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evoprune
from evoprune.errors import OutOfMemory, UsageError, VideoError
from evoprune.model.limits import oom_kills
from evoprune.video.sandbox.channel import Channel
from evoprune.video.sandbox.memory import FrameMemory

if TYPE_CHECKING:
    import numpy as np

# A worker that reports no progress for this long counts as hung, in seconds.
SILENCE_S = 25.0
# What the process runs. It imports from the same paths as this one.
PROGRAM = "import sys; sys.path[:] = {paths}; from evoprune.video.sandbox.worker import main; main({socket})"
ERRORS = {error.type: error for error in (UsageError, VideoError, OutOfMemory)}
HINT = "it is damaged, or made to do harm; if it plays elsewhere, convert it, e.g. with ffmpeg"


class Crash(VideoError):
    """The worker process has ended, or cannot be used any more."""


class WorkerProcess:
    """A process that reads videos, one request at a time: `path` names the video in messages, `busy` says that one is unanswered.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self):
        self.path, self.busy, self._oom_kills = "", False, oom_kills()
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

    def alive(self) -> bool:
        return self._process.poll() is None

    def request(self, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The message that requests a task. Raises VideoError if its path is relative to a folder that no longer exists."""
        try:
            folder = None if os.path.isabs(self.path) else os.getcwd()
        except FileNotFoundError as error:
            raise VideoError(f"cannot read {self.path}: the current folder is gone", "go to another") from error
        return {"task": task, "folder": folder, "arguments": arguments}

    def ask_to_fill(self, memory: FrameMemory, shape: tuple[int, ...], more: dict[str, Any]) -> "np.ndarray":
        """Request the next frames, with `more` entries of the message: uint8 `[n, H, W, 3]`, filled when `answer` returns.

        Raises:
            VideoError: a limit on the size of files forbids such memory. MemoryError: there is none.
        """
        try:
            frames, number, descriptor = memory.take(shape)
        except OSError as error:
            self.busy = True  # in the middle of a video, so the process cannot serve another one
            if error.errno == errno.EFBIG:
                message = "the limit on the size of files is below that of a few frames"
                raise VideoError(message, "ulimit -f unlimited") from error
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

    def answer(self) -> Any:
        """The result of the request.

        Raises:
            Crash: the process ended, or took too much memory. VideoError: no progress for `SILENCE_S`.
            OutOfMemory: the system ended it, because memory ran out. RuntimeError: a bug in the reader. What the task raised.
        """
        try:
            message, _ = self._channel.receive(SILENCE_S)
        except TimeoutError as error:
            message = f"reading {self.path} has come to a standstill: nothing for {SILENCE_S:g} s"
            raise VideoError(message, HINT) from error
        except (OSError, EOFError, ValueError, RecursionError) as error:
            raise self._crash() from error
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

    def _crash(self) -> Crash | OutOfMemory:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            hint = "close other programs, give the container more memory, or convert the video to a smaller size"
            return OutOfMemory(f"out of memory: the system ended the decoder of {self.path}", hint, stage="read")
        end = "its answer is invalid" if code is None else signal.strsignal(-code) if code < 0 else f"exit code {code}"
        problem = Crash(f"the decoder crashed on {self.path} ({end})", HINT)
        problem.add_note(os.pread(self._stderr.fileno(), 2**16, 0).decode(errors="replace"))
        return problem

    def end(self) -> None:
        """Kill the process, whatever it does."""
        self._process.kill()
        self._process.stdin.close()
        self._channel.close()
        self._stderr.close()
        with suppress(subprocess.TimeoutExpired):  # a process that waits for a disk ends once the disk answers
            self._process.wait(1)
