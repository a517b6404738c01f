"""The process that reads videos for another (`isolation`): it serves a socket, under limits, until nobody is at the other end.

Every message asks for something and gets one answer. `{"task", "folder", "arguments"}` asks for one of `tasks.TASKS`, run in that
working folder; `{"shape", "piece", "last"}` for so many pictures, of the task `frames` that came with the first such message, in a
piece of memory, which comes along when it is new and is None where it is for these alone, and whether they are the last.
An answer is `{"result"}`; or what came of it instead: `{"error"}` that users are told, the limit of `{"memory"}`, a `{"bug"}`.
"""

import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from math import prod
from typing import Any

import numpy as np

from evoprune.errors import EvopruneError, VideoError
from evoprune.video import heartbeat
from evoprune.video.info import VideoInfo
from evoprune.video.sandbox.channel import Channel
from evoprune.video.sandbox.tasks import TASKS, Pictures

# How often the other process is told that there is progress, in seconds.
ALIVE_EVERY_S = 1.0
# Memory that any video may take: libraries, stacks of threads, the tables of a long file, one large picture; in bytes.
BASE_BYTES = 2**30
# And for each pixel of a picture: 16 pictures that others are predicted from, one in each of 16 threads, some on their way; of up
# to 3 bytes a pixel (10 bits, 4:2:0).
BYTES_PER_PIXEL = 128


def main(descriptor: int) -> None:
    """Serves the socket of that number. Standard input is a pipe that nobody writes to: its end is that of this process."""
    _end_with(0)
    _confine()
    channel = Channel(socket.socket(fileno=descriptor), descriptors=1)
    heartbeat.alive, heartbeat.pixels = _Pulse(channel).beat, _allow
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody is at the other end
        _serve(channel)


def _end_with(pipe: int) -> None:
    """Has the system end this process, whatever it is at, when the last writer of a pipe is gone."""
    # Not by PR_SET_PDEATHSIG, which goes by the thread that started the process.
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    hung_up = select.poll()
    hung_up.register(pipe, select.POLLHUP)
    if hung_up.poll(0):  # it was gone before
        os.kill(os.getpid(), signal.SIGIO)


def _confine() -> None:
    """No file grows, there is no core, and where memory is short the system takes this process first."""
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(what, (0, 0))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # a system without it takes whichever it likes
        pass


def _allow(pixels: int) -> None:
    """Lets decoding take what pictures of that size need, at least."""
    wanted, (so_far, _) = BASE_BYTES + BYTES_PER_PIXEL * pixels, resource.getrlimit(resource.RLIMIT_DATA)
    if wanted > so_far:
        _limit(wanted)


def _limit(memory: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))


class _Pulse:
    """Signs of life, but not too many."""

    def __init__(self, channel: Channel):
        self._channel, self._last = channel, 0.0

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._last > ALIVE_EVERY_S:
            self._last = now
            self._channel.send_alive()


def _serve(channel: Channel) -> None:
    pictures, pieces = None, {}
    while True:
        message, memory = channel.receive()
        shape, piece, last = (message.pop(name, None) for name in ("shape", "piece", "last"))
        try:
            if message:
                pieces.clear()
            if memory is not None:  # before all that may fail, because that closes the descriptor
                pieces[piece] = _mapped(memory)
            if message:
                if pictures:
                    pictures.close()
                pictures, result = _begin(**message)
            if shape:
                result = pictures.fill(pieces[piece][: prod(shape)].reshape(shape))
            answer = {"result": result}
        except EvopruneError as problem:
            answer = _error(problem)
        except MemoryError:
            answer = {"memory": resource.getrlimit(resource.RLIMIT_DATA)[0]}
        except Exception:
            answer = {"bug": traceback.format_exc()}
        pieces.pop(None, None)  # an array of its own: nobody fills it twice
        if last or "result" not in answer:
            pieces.clear()  # nothing is held while nothing is asked for
        channel.send(answer)


def _begin(task: str, folder: str | None, arguments: dict[str, Any]) -> tuple[Pictures | None, dict | None]:
    _limit(BASE_BYTES)
    if folder is not None:
        try:
            os.chdir(folder)
        except OSError as error:
            raise VideoError(f"cannot enter {folder}: {error.strerror}", "give the whole path of the video") from error
    if task == "frames":
        return Pictures(VideoInfo(**arguments.pop("info")), **arguments), None
    result = TASKS[task](**arguments)
    return None, result and asdict(result)


def _mapped(descriptor: int) -> np.ndarray:
    """uint8 `[bytes]`, memory that is shared with the other process."""
    with os.fdopen(descriptor, "rb+", buffering=0) as file:
        try:
            return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        except OSError as error:
            raise MemoryError(f"no memory for frames: {error.strerror}") from error


def _error(problem: EvopruneError) -> dict:
    return {"error": {"type": problem.type, "message": problem.message, "hint": problem.hint, "stage": problem.stage}}
