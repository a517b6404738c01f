"""Controls how many OpenMP threads the threads of a live stream use."""

import ctypes
import functools
from pathlib import Path

import torch

SOFT = 1  # omp_pause_soft: OpenMP keeps its settings while paused


def release_omp_threads() -> None:
    """Stop the idle OpenMP threads that belong to the current thread. They are restarted when this thread computes again.

    Call this function in a thread that will not compute for a while. If its idle OpenMP threads were kept, the process could have
    more OpenMP threads than there are cores. In that case, the OpenMP threads that compute for another thread sleep between
    parallel steps instead of spinning, and encoding 24 frames with a 3B model takes a sixth longer (results/machines.md).

    Does nothing unless torch uses GNU's OpenMP.
    """
    if library := _openmp():
        library.omp_pause_resource_all(SOFT)


def use_one_omp_thread() -> None:
    """Limit elementwise operations in the current thread, such as scaling, to one OpenMP thread. Matrix products still use many."""
    torch.get_num_threads()  # initializes torch's number of threads for this thread, which would overwrite the 1 later
    if library := _openmp():
        library.omp_set_num_threads(1)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP library that torch has loaded. Returns None if there is no such library or it cannot pause threads."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line)
    path = next((path for path in paths if "torch" in path), None)
    library = path and ctypes.CDLL(path)
    return library if hasattr(library, "omp_pause_resource_all") else None  # added in OpenMP 5.0 (GCC 9)
