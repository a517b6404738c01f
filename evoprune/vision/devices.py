"""What differs between a CPU and a GPU: how much is computed at a time, and which values the program may read meanwhile."""

import torch

# Units encoded at a time, rounded up to whole frame pairs. 512 units (2,048 patches) keep matrix products at full speed and their
# results in a CPU's caches (`python -m experiments.kernels`). A GPU needs more to be busy.
CHUNK_UNITS = 512
GPU_CHUNK_UNITS = 8192
# A chunk may represent this many times more units than it has rows. Attention reads a key for each row that represents its units.
SPARSE = 8
# Entries of a score matrix held at a time, for the same reasons.
SCORES = 1 << 21
GPU_SCORES = 1 << 26


def units_at_a_time(device: torch.device) -> int:
    """How many units are encoded at a time; the caller rounds up to whole frame pairs."""
    return CHUNK_UNITS if device.type == "cpu" else GPU_CHUNK_UNITS


def scores_at_a_time(device: torch.device) -> int:
    """How many entries of a score matrix are held at a time."""
    return SCORES if device.type == "cpu" else GPU_SCORES


def static_shapes(device: torch.device) -> bool:
    """Whether shapes must not depend on values: on a GPU, reading a value makes the program wait for the device.

    On a CPU reading is free, and saves padding and empty rounds of merging.
    """
    return device.type == "cuda"


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on `device`; a copy from the CPU to a GPU does not wait for the work that the GPU has to do."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
