"""Resizing of frames: in bytes on the CPU, in float32 on other devices."""

import torch
import torch.nn.functional as F

from evoprune.backend import devices

FLOATS = 1 << 24  # number of float32 values that a device resizes at a time: 64 MiB


def resized(planes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize planes (uint8 `[F, C, H, W]`) with antialiased bicubic interpolation.

    On the CPU, torch resizes bytes: first the rows, rounded to bytes, then the columns. Other devices do the same steps in float32.
    """
    kwargs = {"mode": "bicubic", "antialias": True}
    if devices.is_host(planes.device):
        return F.interpolate(planes, size=(height, width), **kwargs)
    made = []
    for part in planes.split(max(1, FLOATS // planes[0].numel())):
        for size in ((planes.shape[2], width), (height, width)):
            part = F.interpolate(part.float(), size=size, **kwargs).round_().clamp_(0, 255)
        made.append(part.byte())
    return made[0] if len(made) == 1 else torch.cat(made)
