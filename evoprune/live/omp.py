"""Controls the number of OpenMP threads used by each thread of a live stream."""

import ctypes
import functools
from pathlib import Path

import torch

SOFT = 1  # omp_pause_soft: OpenMP keeps its settings while paused


def release_omp_threads() -> None:
    """Stop the current thread's idle OpenMP threads. They are restarted when this thread performs another computation.

    Call this function in a thread that will not perform any computation for a while. If its idle OpenMP threads were kept, the
    process could have more OpenMP threads than cores. In that case, the OpenMP threads of other threads sleep between parallel
    steps instead of spinning, and encoding 24 frames with a 3B model takes a sixth longer (results/machines.md).

    Does nothing unless torch uses GNU's OpenMP.
    """
    if library := _openmp():
        library.omp_pause_resource_all(SOFT)


def use_one_omp_thread() -> None:
    """Limit elementwise operations in the current thread, such as scaling, to one OpenMP thread. Matrix products are unaffected."""
    torch.get_num_threads()  # initializes torch's thread count for this thread, which would otherwise overwrite the 1 later
    if library := _openmp():
        library.omp_set_num_threads(1)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP library loaded by torch, or None if it is not loaded or does not support pausing threads."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line)
    path = next((path for path in paths if "torch" in path), None)
    library = path and ctypes.CDLL(path)
    return library if hasattr(library, "omp_pause_resource_all") else None  # added in OpenMP 5.0 (GCC 9)
