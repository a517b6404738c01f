"""This machine and process: facts for reports and checks of memory; pages of memory-mapped weights; threads; waits for devices."""

import ctypes
import functools
import mmap
import platform
import sys
import threading
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch

import evoprune
from evoprune.model import limits
from evoprune.report.records import Environment

PIECE = 2**26  # bytes asked for at a time
SOFT = 1  # how OpenMP pauses: it keeps what was set
WILL_NEED, COLD, POPULATE_READ = 3, 20, 22  # in Linux, the second since 5.4, the third since 5.14


def environment(device: str) -> Environment:
    """Versions, device and threads."""
    return Environment(
        evoprune=evoprune.__version__,
        torch=torch.__version__,
        transformers=version("transformers"),
        device_name=torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name(),
        threads=torch.get_num_threads(),
    )


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory(device: str) -> int | None:
    """Bytes: on CUDA the allocator's peak, else the largest resident size of this process so far. None where unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage: on Linux its peak includes the process that started this one.
        return limits.kib(Path("/proc/self/status"), "VmHWM")[0]
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_use(device: str) -> tuple[int | None, int | None]:
    """Bytes of this process now: its own, and pages of files mapped into memory. None where unknown, and on CUDA."""
    if device.startswith("cuda"):
        return None, None
    try:
        own, shared, mapped = limits.kib(Path("/proc/self/status"), "RssAnon", "RssShmem", "RssFile")
        return own + shared, mapped
    except (OSError, KeyError):
        return None, None


def reset_peak_memory(device: str) -> bool:
    """Restarts the count of `peak_memory`; False where the system cannot."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        with open("/proc/self/clear_refs", "w") as f:
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)  # memory that was freed and is kept would be used uncounted
            f.write("5")
    except OSError:
        return False
    return True


def available_memory(device: str) -> int | None:
    """Bytes that this process can get now without swapping; None where unknown, and on the meta device, which needs none.

    On CUDA: what is free on the device and in torch's own allocator. Else see `limits.available_memory`.
    """
    if device.startswith("cuda"):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return None if device == "meta" else limits.available_memory()


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


def end_team() -> None:
    """Ends the OpenMP threads that wait for this thread, which computes no more for now. They are started again when it does.

    With more of them than cores, those that compute for another thread sleep in place of spinning between two parallel steps,
    which makes encoding 24 frames at 3B a sixth slower (results/machines.md). Does nothing where torch has another OpenMP than
    GNU's.
    """
    if library := _openmp():
        library.omp_pause_resource_all(SOFT)


def compute_alone() -> None:
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


def reading_waits(device: torch.device) -> bool:
    """Whether reading a value waits for the device: everywhere but on the CPU. There, no shape may depend on values."""
    return device.type != "cpu"


def is_accelerator(device: torch.device) -> bool:
    """Whether it is of the kind that torch drives here by streams and events, to which pinned memory is copied meanwhile."""
    found = torch.accelerator.current_accelerator()
    return found is not None and found.type == device.type


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on `device`. A copy from the CPU to an accelerator does not wait for it."""
    if x.device.type == "cpu" and is_accelerator(device):
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
