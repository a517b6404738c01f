"""Resize frames and cut them into patches in Hugging Face's order.

The 2x2 patches of a unit are four consecutive rows, and units are in raster order. A row holds the pixels by channel, frame, y
and x. After normalization (patches.py), the result equals the output of `Qwen2VLImageProcessor`, without needing torchvision.
"""

import numpy as np
import torch
import torch.nn.functional as F

from evoprune.backend import Device, to_device
from evoprune.video import InputLimits, Plan

# Maximum shrink factor for a side of a frame on a device, because torch's CUDA kernel rejects much larger factors.
MAX_SHRINK = 32
FLOATS = 1 << 24  # number of float32 values that a device resizes at a time: 64 MiB


def patches_of(frames: np.ndarray, plan: Plan, limits: InputLimits, device: torch.device) -> torch.Tensor:
    """Return the patches of frames, uint8 `[rows, values]` on `device`, after resizing to the size in `plan`.

    The frames are copied to the device at full size, then resized and cut there. Frames that have to shrink by more than
    `MAX_SHRINK` are resized on the CPU first.

    Args:
        frames: uint8 `[n, height, width, 3]`.
    """
    pixels, (height, width) = torch.from_numpy(frames), frames.shape[1:3]
    if max(height / plan.height, width / plan.width) > MAX_SHRINK:
        pixels = resize(pixels, plan.height, plan.width)
    resized = resize(to_device(pixels, device), plan.height, plan.width)
    return pixel_patches(resized, limits.patch_size, limits.temporal_patch_size, limits.merge_size)


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize frames (uint8 `[F, H, W, 3]`) with antialiased bicubic interpolation.

    The result differs from PIL's by at most one level of 255. On the CPU, torch resizes bytes: first the rows, rounded to bytes,
    then the columns. Other devices do the same steps in float32.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    planes = frames.permute(0, 3, 1, 2)
    kwargs = {"mode": "bicubic", "antialias": True}
    if Device(frames.device).resizes_bytes:
        return F.interpolate(planes, size=(height, width), **kwargs).permute(0, 2, 3, 1)
    parts = []
    for part in planes.split(max(1, FLOATS // planes[0].numel())):
        for size in ((planes.shape[2], width), (height, width)):
            part = F.interpolate(part.float(), size=size, **kwargs).round_().clamp_(0, 255)
        parts.append(part.byte())
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).permute(0, 2, 3, 1)


def pixel_patches(frames: torch.Tensor, patch: int = 14, temporal: int = 2, merge: int = 2) -> torch.Tensor:
    """Cut frames into patches in Hugging Face's order.

    Args:
        frames: uint8 `[F, H, W, 3]`. F is a multiple of `temporal`, or 1 for an image, which is repeated to fill a frame pair. H
            and W are multiples of `patch * merge`.

    Returns:
        uint8 `[max(1, F/temporal) * H/patch * W/patch, 3 * temporal * patch * patch]`.
    """
    if len(frames) == 1:
        frames = frames.expand(temporal, -1, -1, -1)
    f, h, w, c = frames.shape
    unit = patch * merge
    x = frames.reshape(f // temporal, temporal, h // unit, merge, patch, w // unit, merge, patch, c)
    # pair, unit y, x, patch y, x, channel, frame, y, x
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, c * temporal * patch * patch)
