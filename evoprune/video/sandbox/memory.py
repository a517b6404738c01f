"""Memory for frames that two processes share."""

import mmap
import os
import weakref
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Arrays of one video that share reused memory: the caller's, the one before it, and the one that is being filled.
PIECES = 3


class FrameMemory:
    """Shared memory for the frames of one video, array after array; `size` is the bytes of the largest.

    A piece is used again once nobody holds its array or a view of it. New memory would come from the system page by page, in
    both processes, which takes as long as decoding a picture. Callers that hold more than `PIECES` arrays get further ones
    in memory of their own.
    """

    def __init__(self, size: int):
        self._size, self._forks = size, _forks
        self._pieces: list[mmap.mmap] = []
        self._free: list[int] = []

    def take(self, shape: tuple[int, ...]) -> tuple["np.ndarray", int | None, int | None]:
        """An array to be filled, uint8 of that shape. Raises OSError where there is no memory.

        Returns:
            The array; the number of its piece, None if it has memory of its own; and a file descriptor of the memory, which the
            caller closes, None if the other process has it already.
        """
        import numpy as np

        size, descriptor = prod(shape), None
        if self._forks != _forks:  # a forked copy may hold arrays that this process has released: do not reuse them
            self._forks, self._pieces, self._free = _forks, [], []
        if self._free:
            number = self._free.pop()
        elif (
            len(self._pieces) < PIECES and 2 * size > self._size
        ):  # a video's last array may be small, and held for long
            piece, descriptor = shared_memory(self._size)
            number = len(self._pieces)
            self._pieces.append(piece)
        else:
            piece, descriptor = shared_memory(size)
            return np.frombuffer(piece, np.uint8).reshape(shape), None, descriptor
        array = np.frombuffer(self._pieces[number], np.uint8, size)  # all views of it keep this array alive
        weakref.finalize(array, self._free.append, number).atexit = False
        return array.reshape(shape), number, descriptor


def shared_memory(size: int) -> tuple[mmap.mmap, int]:
    """`size` bytes, and a file descriptor of them for another process, which cannot shrink them."""
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
