"""What differs between a CPU and a GPU: how much is encoded at a time, and what the host may look at meanwhile."""

from contextlib import AbstractContextManager, nullcontext

import torch

# Units encoded at a time, rounded up to whole blocks of grids. 2,048 rows of patches keep matrix products at full speed and what
# lies between them in a CPU's caches (`python -m experiments.kernels`). A GPU wants more at once.
CHUNK_UNITS = 512
GPU_CHUNK_UNITS = 8192
# So many times as many units may refer to the rows that are encoded at a time. Each is a key where it is looked at.
SPARSE = 8


def units_at_a_time(device: torch.device) -> int:
    """How many units are encoded at a time, rounded up to whole blocks of grids."""
    return CHUNK_UNITS if device.type == "cpu" else GPU_CHUNK_UNITS


def here(device: torch.device) -> AbstractContextManager:
    """Where new tensors are made on `device`; nothing to enter where they are anyway, since each operation inside pays for it."""
    return nullcontext() if torch.get_default_device() == device else device


def static_shapes(device: torch.device) -> bool:
    """Whether shapes may not depend on values: on a GPU the host would have to wait for them.

    On a CPU looking is free, and saves padding and rounds that have nothing to do.
    """
    return device.type == "cuda"


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` from the host, sent without waiting for what the device still has to do."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
