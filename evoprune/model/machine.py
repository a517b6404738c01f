"""Facts about this machine and process, for reports and for checks of memory."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import evoprune
from evoprune.model import limits
from evoprune.report.records import Environment


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
        return limits.kib(Path("/proc/self/status"), "VmHWM")
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_use(device: str) -> tuple[int | None, int | None]:
    """Bytes of this process now: its own, and pages of files mapped into memory. None where unknown, and on CUDA."""
    status = Path("/proc/self/status")
    if device.startswith("cuda"):
        return None, None
    try:
        return limits.kib(status, "RssAnon") + limits.kib(status, "RssShmem"), limits.kib(status, "RssFile")
    except (OSError, StopIteration):
        return None, None


def reset_peak_memory(device: str) -> bool:
    """Restarts the count of `peak_memory`; False where the system cannot."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        with open("/proc/self/clear_refs", "w") as f:
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
