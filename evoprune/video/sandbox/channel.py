"""Communication with a worker process through JSON messages, heartbeats, and shared memory for frames.

Each message can carry at most one file descriptor. Messages are never pickled, because a malicious video might take control of the
worker, and unpickling the worker's messages would then allow it to run code in the current process.
"""

import json
import mmap
import os
import select
import socket
import struct
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from evoprune.errors import VideoError

if TYPE_CHECKING:
    import numpy as np

# Number of reusable arrays per video: the array in use by the caller, the array before it, and the array that the worker is
# filling.
PIECES = 3
LARGEST = 2**26  # maximum size of a message in bytes
ALIVE_EVERY_S = 1.0  # minimum interval between heartbeats
_LENGTH = struct.Struct("<I")
# Heartbeat marker. It is sent instead of a message length and is followed by the number of finished frames.
_ALIVE = _LENGTH.pack(0)


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life from a worker that is still working on an answer."""

    done: int  # number of frames finished so far


class Channel:
    """One end of a connected pair of Unix sockets. Sending and receiving may raise OSError.

    `send` raises VideoError if a message is larger than `LARGEST`. Nothing is sent in this case.

    Args:
        descriptors: Maximum number of file descriptors in a received message.

    Attributes:
        done: Number of frames finished so far for the next answer. Heartbeats report this number, and `send` resets it to 0.
    """

    def __init__(self, end: socket.socket, descriptors: int = 0):
        self._socket = end
        self._reported = 0.0
        self.done = 0
        self._descriptors = descriptors

    def send(self, message: dict, descriptor: int | None = None) -> None:
        content = json.dumps(message).encode()
        if len(content) > LARGEST:
            # For example, the request contains a very long path, or the answer lists the times of millions of frames.
            problem = f"reading takes a message of {len(content):,} bytes, but {LARGEST:,} is the maximum"
            raise VideoError(problem, "read fewer frames at a time, or a shorter video; and check the path")
        head = _LENGTH.pack(len(content))
        if descriptor is not None:
            socket.send_fds(self._socket, [head], [descriptor])
            head = b""
        self._socket.sendall(head + content)
        self.done = 0

    def report_alive(self) -> None:
        """Send a heartbeat with the number of finished frames, at most once every `ALIVE_EVERY_S` seconds."""
        now = time.monotonic()
        if now - self._reported > ALIVE_EVERY_S:
            self._reported = now
            self._socket.sendall(_ALIVE + _LENGTH.pack(min(self.done, LARGEST)))

    def has_message(self, patience_s: float) -> bool:
        """Return True if `receive` would not block. Waits up to `patience_s` seconds for a message."""
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        return bool(waiting.poll(1000 * patience_s))

    def receive(self, patience_s: float | None = None) -> tuple[dict | Heartbeat, int | None]:
        """Wait for the next message or heartbeat.

        Args:
            patience_s: Timeout in seconds, or None to wait forever.

        Returns:
            The message or heartbeat, and the message's file descriptor, or None if there isn't one. The caller must close the
            descriptor.

        Raises:
            EOFError: The other end was closed.
            TimeoutError: Nothing arrived within `patience_s`.
        """
        self._socket.settimeout(patience_s)
        head, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH.size, self._descriptors)
        if not head:
            raise EOFError
        (length,) = _LENGTH.unpack(head + self._exactly(_LENGTH.size - len(head)))
        if length > LARGEST:
            raise OSError(f"a message of {length:,} bytes")
        if not length:
            (done,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
            return Heartbeat(done), None
        message = json.loads(self._exactly(length))
        return message, next(iter(descriptors), None)

    def _exactly(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            piece = self._socket.recv(min(size - len(content), 2**20))
            if not piece:
                raise EOFError
            content += piece
        return bytes(content)

    def shut(self) -> None:
        """Shut down the connection. EOFError is raised in any thread waiting in `receive`."""
        with suppress(OSError):  # the other end is closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class FrameMemory:
    """Shared memory for the arrays of a single video.

    A piece of memory is reused after its array and all views of the array have been garbage-collected. This saves time, because new
    memory has to be mapped page by page in both processes, which takes as long as decoding a frame. If a caller keeps more than
    `PIECES` arrays, each additional array gets its own memory, which is not reused.

    Args:
        size: Size in bytes of the largest array that will be requested.
    """

    def __init__(self, size: int):
        self._size = size
        self._forks = _forks
        self._pieces: list[mmap.mmap] = []
        self._free: list[int] = []

    def take(self, shape: tuple[int, ...]) -> tuple["np.ndarray", int | None, int | None]:
        """Return shared memory for an array to be filled by the worker.

        Returns:
            A tuple of a uint8 array with the given shape; the index of its piece of memory, or None if the memory will not be
            reused; and a file descriptor for the memory, or None if the worker has already mapped it. The caller must close the
            descriptor.

        Raises:
            OSError: No memory can be allocated.
        """
        import numpy as np

        size = prod(shape)
        descriptor = None
        if self._forks != _forks:  # a forked child process may still use arrays that this process has released
            self._forks, self._pieces, self._free = _forks, [], []
        if self._free:
            number = self._free.pop()
        elif len(self._pieces) == PIECES or 2 * size <= self._size:
            # The last array may be small, and a caller that keeps it shouldn't occupy a large piece.
            piece, descriptor = shared_memory(size)
            return np.frombuffer(piece, np.uint8).reshape(shape), None, descriptor
        else:
            piece, descriptor = shared_memory(self._size)
            number = len(self._pieces)
            self._pieces.append(piece)
        array = np.frombuffer(self._pieces[number], np.uint8, size)  # this array stays alive as long as any view of it
        weakref.finalize(array, self._free.append, number).atexit = False
        return array.reshape(shape), number, descriptor


def shared_memory(size: int) -> tuple[mmap.mmap, int]:
    """Allocate `size` bytes of shared memory.

    Returns:
        The mapped memory, and a file descriptor to pass to another process. No process can resize the memory.
    """
    import fcntl

    descriptor = os.memfd_create("evoprune-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return mmap.mmap(descriptor, 0), descriptor
    except OSError:
        os.close(descriptor)
        raise


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_count_fork, after_in_parent=_count_fork)
