"""Pages of memory-mapped weights, and threads of this process."""

import ctypes
import functools
import mmap
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

PIECE_BYTES = 2**26  # bytes asked for at a time
SOFT = 1  # how OpenMP pauses: it keeps what was set
# in Linux, the second since 5.4, the third since 5.14
WILL_NEED = 3
COLD = 20
POPULATE_READ = 22


def page_in(weights: Iterable[torch.Tensor]) -> threading.Thread | None:
    """Starts to read the pages of memory-mapped tensors, in this order. Returns the thread; None where this is not possible.

    Without it every product waits for the pages of its weights: for the disk, or, where the file is cached, for entries of the page
    table. Nothing depends on it: a page that was not read yet, or was dropped again, is read when it is used.
    """
    if sys.platform != "linux":
        return None
    thread = threading.Thread(target=_read, args=(list(weights),), name="evoprune-page-in", daemon=True)
    thread.start()
    return thread


def madvise_cold(weight: torch.Tensor) -> None:
    """Lets the system take the pages of a memory-mapped tensor before others when memory is short. The tensor stays as it is."""
    if sys.platform == "linux":
        _madvise()(*_pages(weight), COLD)  # an older system refuses


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    """Return the system's advice about an address, a number of bytes; 0 if it was taken."""
    madvise = ctypes.CDLL(None).madvise  # a call through ctypes lets other threads of Python run
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise


def _pages(weight: torch.Tensor) -> tuple[int, int]:
    """Return the first address and the number of bytes of the whole pages that a tensor lies in."""
    start = weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return start, -(-(weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE - start


def _read(weights: list[torch.Tensor]) -> None:
    madvise = _madvise()
    for start, size in map(_pages, weights):  # they are held meanwhile, so their memory stays mapped
        for offset in range(0, size, PIECE_BYTES):
            piece = start + offset, min(PIECE_BYTES, size - offset)
            madvise(*piece, WILL_NEED)  # the disk reads all of it at once
            if madvise(*piece, POPULATE_READ):
                return  # an older system, or no memory


def release_omp_threads() -> None:
    """Ends the OpenMP threads that wait for this thread, which computes no more for now. They are started again when it does.

    With more of them than cores, those that compute for another thread sleep in place of spinning between two parallel steps,
    which makes encoding 24 frames at 3B a sixth slower (results/machines.md). Does nothing where torch has another OpenMP than
    GNU's.
    """
    if library := _openmp():
        library.omp_pause_resource_all(SOFT)


def use_one_omp_thread() -> None:
    """Has this thread scale pictures, or compute other elements one by one, without others from now on; products take others."""
    torch.get_num_threads()  # torch gives each thread the number once, before it first computes
    if library := _openmp():
        library.omp_set_num_threads(1)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP library, as torch has loaded it."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line)
    path = next((path for path in paths if "torch" in path), None)
    library = path and ctypes.CDLL(path)
    return library if hasattr(library, "omp_pause_resource_all") else None  # OpenMP 5.0, since GCC 9
