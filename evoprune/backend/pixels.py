"""Pictures in the form for a device: bytes on the CPU, float32 elsewhere."""

import torch
import torch.nn.functional as F

from evoprune.backend import devices

FLOATS = 1 << 24  # values of frames that a device resizes at a time, in float32: 64 MiB


def resized(planes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes planes (uint8 `[F, C, H, W]`) by antialiased bicubic interpolation.

    On a CPU torch reduces bytes: rows, which it rounds to bytes, and then columns. On another device float32 goes the same way.
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
