"""The program of a worker process: it serves requests over a socket, under limits, until the other end closes.

Every message is a request and gets one answer.
- `{"task", "folder", "arguments"}` runs one of `tasks.TASKS` in that working directory. The task `frames` opens a video.
- `{"shape", "piece", "last"}` fills an array of that shape with the next frames of the open video. `piece` numbers the memory
  that holds the array; new memory comes with the message as a file descriptor; None means that it is used only once. `last`
  says that no further array follows. The first request of this kind comes in one message with the task `frames`.
- The task `live` opens a source that does not wait, of which a pipe comes as a file descriptor. Then the task `next` looks for
  its next frame, and `shape` takes it.
- The answer is `{"result"}`, or `{"error"}` for the user, or `{"memory"}` with the limit that was exceeded, or `{"bug"}`.
"""

import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import traceback
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np

from evoprune.errors import EvopruneError, VideoError
from evoprune.video.info import Video
from evoprune.video.readers import ffmpeg
from evoprune.video.readers.live import LiveReader
from evoprune.video.sandbox.channel import Channel
from evoprune.video.sandbox.tasks import FrameReader, run

# Memory that any video may take, in bytes: libraries, stacks of threads, the tables of a long file, one large picture.
BASE_BYTES = 2**30
# And for each pixel of a picture: 16 reference pictures, one picture in each of 16 threads, and some in queues, of up to
# 3 bytes a pixel (10 bits, 4:2:0).
BYTES_PER_PIXEL = 128


def main(descriptor: int) -> None:
    """Serve the socket with that file descriptor. Standard input is a pipe without data; this process ends when it closes."""
    _end_with(0)
    _confine()
    channel = Channel(socket.socket(fileno=descriptor), descriptors=1)
    ffmpeg.alive, ffmpeg.picture_size = channel.report_alive, _allow
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


def _confine() -> None:
    """Forbid files to grow and core dumps, and let the system kill this process first if memory runs out."""
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(what, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # not every system has it
        file.write("1000")


def _allow(pixels: int) -> None:
    """Raise the memory limit to what decoding pictures of that size needs."""
    _limit(max(BASE_BYTES + BYTES_PER_PIXEL * pixels, resource.getrlimit(resource.RLIMIT_DATA)[0]))


def _limit(memory: int) -> None:
    """Set the memory limit in bytes, within the hard limit."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))


def _serve(channel: Channel) -> None:
    reader, pieces = None, {}
    while True:
        message, memory = channel.receive()
        shape, piece, last = (message.pop(name, None) for name in ("shape", "piece", "last"))
        try:
            if message.get("task") == "next":
                result = reader.next(**message["arguments"])
                message = None
            elif message:
                pieces.clear()
            if message and message["task"] == "live":
                message["arguments"]["descriptor"], memory = memory, None
            if memory is not None:  # first, because it closes the descriptor whatever fails later
                pieces[piece] = _mapped(memory)
            if message:
                if reader:
                    reader.close()
                reader, result = _begin(**message)
            if shape:
                result = reader.fill(pieces[piece][: prod(shape)].reshape(shape))
            answer = {"result": result}
        except EvopruneError as problem:
            answer = {"error": {name: getattr(problem, name) for name in ("type", "message", "hint", "stage")}}
        except MemoryError:
            answer = {"memory": resource.getrlimit(resource.RLIMIT_DATA)[0]}
        except Exception:
            answer = {"bug": traceback.format_exc()}
        pieces.pop(None, None)  # used only once
        if last or "result" not in answer:
            pieces.clear()  # an idle process holds no memory for frames
        channel.send(answer)


def _begin(
    task: str, folder: str | None, arguments: dict[str, Any]
) -> tuple[FrameReader | LiveReader | None, dict | None]:
    """Run a task: the reader that it opens, if any, and its result."""
    _limit(BASE_BYTES)
    if folder is not None:
        try:
            os.chdir(folder)
        except OSError as error:
            raise VideoError(f"cannot enter {folder}: {error.strerror}", "give the whole path of the video") from error
    if task == "frames":
        return FrameReader(Video(**arguments.pop("info")), **arguments), None
    if task == "live":
        reader = LiveReader(**arguments)
        return reader, reader.facts
    return None, run(task, arguments)


def _mapped(descriptor: int) -> np.ndarray:
    """uint8 `[bytes]`: memory that is shared with the other process. Closes the descriptor."""
    with os.fdopen(descriptor, "rb+", buffering=0) as file:
        try:
            return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        except OSError as error:
            raise MemoryError(f"no memory for frames: {error.strerror}") from error
