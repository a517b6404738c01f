"""Controls the OpenMP threads of this process, which are shared by the threads of a live stream."""

import ctypes
import functools
from pathlib import Path

import torch

SOFT = 1  # omp_pause_soft: OpenMP keeps its settings while paused


def release_omp_threads() -> None:
    """End the idle OpenMP threads of the current thread, which will not compute for a while. They restart when it computes again.

    If there are more OpenMP threads than cores, threads that compute for another thread sleep between parallel steps instead of
    spinning. That makes encoding 24 frames with a 3B model a sixth slower (results/machines.md). This is a no-op unless torch uses
    GNU's OpenMP.
    """
    if library := _openmp():
        library.omp_pause_resource_all(SOFT)


def use_one_omp_thread() -> None:
    """Make the current thread run elementwise operations, such as scaling, on its own. Matrix products still use many threads."""
    torch.get_num_threads()  # makes torch set this thread's number of threads now; otherwise torch would later overwrite the 1
    if library := _openmp():
        library.omp_set_num_threads(1)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP library loaded by torch, or None if there is no such library or it cannot pause threads."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line)
    path = next((path for path in paths if "torch" in path), None)
    library = path and ctypes.CDLL(path)
    return library if hasattr(library, "omp_pause_resource_all") else None  # OpenMP 5.0, since GCC 9
