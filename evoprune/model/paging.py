"""Tells the system which memory-mapped weights are used soon, and which no longer.

A thread brings those that are used soon into memory. Without it every product waits for the pages of its weights: for the
disk, or, where the file is cached, for the entries of the page table, which several threads of a product want at once.
"""

import ctypes
import functools
import mmap
import sys
import threading
from collections.abc import Callable, Iterable

import torch

PIECE = 2**26  # bytes asked for at a time
WILL_NEED, COLD, POPULATE_READ = 3, 20, 22  # in Linux, the second since 5.4, the third since 5.14


def page_in(weights: Iterable[torch.Tensor]) -> threading.Thread | None:
    """Starts to read the pages of memory-mapped tensors, in this order. Returns the thread; None where this is not possible.

    Nothing depends on it: a page that was not read yet, or was dropped again, is read when it is used.
    """
    if sys.platform != "linux":
        return None
    thread = threading.Thread(target=_read, args=(list(weights),), name="evoprune-page-in", daemon=True)
    thread.start()
    return thread


def cool(weight: torch.Tensor) -> None:
    """Lets the system take the pages of a memory-mapped tensor before others when memory is short. The tensor stays as it is."""
    if sys.platform == "linux":
        _madvise()(*_pages(weight), COLD)  # an older system refuses


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    """The system's advice about an address, a number of bytes; 0 if it was taken."""
    madvise = ctypes.CDLL(None).madvise  # a call through ctypes lets other threads of Python run
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise


def _pages(weight: torch.Tensor) -> tuple[int, int]:
    """The first address and the number of bytes of the whole pages that a tensor lies in."""
    start = weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return start, -(-(weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE - start


def _read(weights: list[torch.Tensor]) -> None:
    madvise = _madvise()
    for start, size in map(_pages, weights):  # they are held meanwhile, so their memory stays mapped
        for offset in range(0, size, PIECE):
            piece = start + offset, min(PIECE, size - offset)
            madvise(*piece, WILL_NEED)  # the disk reads all of it at once
            if madvise(*piece, POPULATE_READ):
                return  # an older system, or no memory
