"""Threads of this process."""

import ctypes
import functools
from pathlib import Path

import torch

SOFT = 1  # how OpenMP pauses: it keeps what was set


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
    """Return GNU's OpenMP library, as torch has loaded it."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line)
    path = next((path for path in paths if "torch" in path), None)
    library = path and ctypes.CDLL(path)
    return library if hasattr(library, "omp_pause_resource_all") else None  # OpenMP 5.0, since GCC 9
