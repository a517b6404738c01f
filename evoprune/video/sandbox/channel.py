"""Between two processes: messages, plain data as JSON with at most one file descriptor, signs of life, and memory for frames.

No pickle: a malicious video may have taken over the process that reads it, and must not run code in the other one.
"""

import json
import mmap
import os
import socket
import struct
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Arrays of one video that share reused memory: the caller's, the one before it, and the one that is being filled.
PIECES = 3
LARGEST = 2**26  # bytes of a message
ALIVE_EVERY_S = 1.0  # signs of life come at most this often
_LENGTH = struct.Struct("<I")
_ALIVE = _LENGTH.pack(0)  # in the place of a message's length; then what is done


class Channel:
    """Hold one end of a connected Unix socket. Sending and receiving may raise OSError; the caller closes a `descriptor` that came.

    `done`: how many frames of the answer are there, which signs of life tell; 0 after each message.
    """

    def __init__(self, end: socket.socket, descriptors: int = 0):
        self._socket = end
        self._reported = 0.0
        self.done = 0
        self._descriptors = descriptors  # that a message may bring

    def send(self, message: dict, descriptor: int | None = None) -> None:
        content = json.dumps(message).encode()
        if len(content) > LARGEST:
            raise ValueError(f"a message of {len(content):,} bytes")
        head = _LENGTH.pack(len(content))
        if descriptor is not None:
            socket.send_fds(self._socket, [head], [descriptor])
            head = b""
        self._socket.sendall(head + content)
        self.done = 0

    def report_alive(self) -> None:
        """Report progress before there is a message, unless that was done just now."""
        now = time.monotonic()
        if now - self._reported > ALIVE_EVERY_S:
            self._reported = now
            self._socket.sendall(_ALIVE + _LENGTH.pack(min(self.done, LARGEST)))

    def receive(
        self, patience_s: float | None = None, on_alive: Callable[[int], None] | None = None
    ) -> tuple[dict, int | None]:
        """Return the next message, and the descriptor that came with it. `on_alive`: called with what a sign of life tells.

        Raises EOFError: the other end is closed. TimeoutError: neither a message nor a sign of life for `patience_s`.
        """
        self._socket.settimeout(patience_s)
        while True:
            head, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH.size, self._descriptors)
            if not head:
                raise EOFError
            (length,) = _LENGTH.unpack(head + self._exactly(_LENGTH.size - len(head)))
            if length > LARGEST:
                raise OSError(f"a message of {length:,} bytes")
            if length:
                message = json.loads(self._exactly(length))
                return message, next(iter(descriptors), None)
            (done,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
            if on_alive:
                on_alive(done)

    def _exactly(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            piece = self._socket.recv(min(size - len(content), 2**20))
            if not piece:
                raise EOFError
            content += piece
        return bytes(content)

    def shut(self) -> None:
        """Shut the channel, for another thread: whoever receives gets an EOFError."""
        with suppress(OSError):  # the other end is closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class FrameMemory:
    """Shared memory for the frames of one video, array after array; `size` is the bytes of the largest.

    A piece is used again once nobody holds its array or a view of it. New memory would come from the system page by page, in
    both processes, which takes as long as decoding a picture. Callers that hold more than `PIECES` arrays get further ones
    in memory of their own.
    """

    def __init__(self, size: int):
        self._size = size
        self._forks = _forks
        self._pieces: list[mmap.mmap] = []
        self._free: list[int] = []

    def take(self, shape: tuple[int, ...]) -> tuple["np.ndarray", int | None, int | None]:
        """Return a uint8 array to be filled; the number of its piece, None if it has memory of its own; and a file descriptor of
        the memory, which the caller closes, None if the other process has it already. Raises OSError where there is no memory.
        """
        import numpy as np

        size = prod(shape)
        descriptor = None
        if self._forks != _forks:  # a forked copy may hold arrays that this process has released: do not reuse them
            self._forks, self._pieces, self._free = _forks, [], []
        if self._free:
            number = self._free.pop()
        elif len(self._pieces) == PIECES or 2 * size <= self._size:  # the last array may be small, and held for long
            piece, descriptor = shared_memory(size)
            return np.frombuffer(piece, np.uint8).reshape(shape), None, descriptor
        else:
            piece, descriptor = shared_memory(self._size)
            number = len(self._pieces)
            self._pieces.append(piece)
        array = np.frombuffer(self._pieces[number], np.uint8, size)  # all views of it keep this array alive
        weakref.finalize(array, self._free.append, number).atexit = False
        return array.reshape(shape), number, descriptor


def shared_memory(size: int) -> tuple[mmap.mmap, int]:
    """Make `size` bytes of memory, and a file descriptor of them for another process, which cannot shrink them."""
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
