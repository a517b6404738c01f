"""The one question that the program asks about a device: does reading a value wait for it? And copies for which nothing waits."""

import torch


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
