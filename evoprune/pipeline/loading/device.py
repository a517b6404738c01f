"""Where a model runs, and in which dtype."""

from pathlib import Path

import torch

from evoprune.errors import UsageError, first_line
from evoprune.model.precision import check_dtype

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def has_cuda() -> bool:
    return torch.cuda.is_available()


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA if there is any, else the CPU.

    Raises:
        UsageError: it cannot be used.
    """
    if name == "auto":
        name = "cuda" if has_cuda() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as problem:  # torch without CUDA asserts
        reason = first_line(problem)
        raise UsageError(
            f"device {name!r} cannot be used here: {reason}", "cpu always works, auto finds a GPU"
        ) from problem
    return device


def pick_dtype(name: str, device: torch.device, is_demo: bool) -> str:
    """The short name of a dtype; "auto" depends on the device, see `ModelOptions`.

    Raises:
        UsageError: an unknown name.
    """
    check_dtype(name)
    if name == "auto":
        bf16 = device.type == "cuda" or (device.type == "cpu" and cpu_has_bf16())
        return "bf16" if bf16 and not is_demo else "fp32"
    return name


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; where it does not, bf16 is slower than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):  # not in the oldest torch that is supported
        found = {name for name, value in torch.cpu.get_capabilities().items() if value}
    else:
        cpuinfo = Path("/proc/cpuinfo")
        found = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return bool(found & {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"})
