"""Controls how the threads of a live stream use this process's OpenMP threads."""

import ctypes
import functools
from pathlib import Path

import torch

SOFT = 1  # omp_pause_soft: OpenMP keeps its settings while paused


def release_omp_threads() -> None:
    """End the idle OpenMP threads that belong to the current thread. They are restarted when this thread computes again.

    Call this in a thread that will not compute for a while. If its idle OpenMP threads were kept, there could be more OpenMP
    threads than cores. The OpenMP threads that compute for another thread would then sleep between parallel steps instead of
    spinning, which makes encoding 24 frames with a 3B model take a sixth longer (results/machines.md).

    Does nothing unless torch uses GNU's OpenMP.
    """
    if library := _openmp():
        library.omp_pause_resource_all(SOFT)


def use_one_omp_thread() -> None:
    """Use only one thread for the current thread's elementwise operations, such as scaling. Matrix products still use many."""
    torch.get_num_threads()  # makes torch initialize this thread's number of threads now, or it would overwrite the 1 later
    if library := _openmp():
        library.omp_set_num_threads(1)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP library that torch has loaded, or None if there is none or if it cannot pause threads."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line)
    path = next((path for path in paths if "torch" in path), None)
    library = path and ctypes.CDLL(path)
    return library if hasattr(library, "omp_pause_resource_all") else None  # added in OpenMP 5.0 (GCC 9)
