"""Facts about this machine and process that belong beside every measurement."""

import platform
import sys

import torch
import transformers

import evoprune
from evoprune.report import Environment


def environment(device: str) -> Environment:
    """Versions, device and threads."""
    return Environment(
        evoprune=evoprune.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
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
    """Bytes: on CUDA the allocator's peak, else the largest resident size of this process so far; None where unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage first: on Linux its peak goes back to the process that started this one.
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
