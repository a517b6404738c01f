"""Resizes frames and cuts them into patches in Hugging Face's order.

In this order, units are in raster order, and the 2x2 patches of a unit are four consecutive rows. Inside a row, pixels are ordered
by channel, frame, y and x. After normalization (patches.py), the patches are equal to the output of `Qwen2VLImageProcessor`, but
torchvision is not required.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from evoprune.backend import Device, to_device
from evoprune.video import InputLimits, Plan

# Maximum factor by which an accelerator shrinks a frame's width or height. Torch's CUDA kernel rejects much larger factors.
MAX_SHRINK = 32
FLOATS = 1 << 24  # number of float32 values to resize at a time on an accelerator (64 MiB)


def patches_of(frames: np.ndarray, plan: Plan, limits: InputLimits, device: torch.device) -> torch.Tensor:
    """Resize frames to the size in `plan` and cut them into patches. Returns uint8 `[rows, values]` on `device`.

    The frames are copied to the device at full size, then resized and cut there. Frames are resized on the CPU only if they have to
    shrink by more than `MAX_SHRINK`.

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

    The result differs from Pillow's by at most one level out of 255. On the CPU, torch resizes the bytes directly: first
    horizontally, rounding to bytes, and then vertically. Other devices perform the same steps in float32.

    Returns:
        uint8 `[F, height, width, 3]`, on the same device.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    planes = frames.permute(0, 3, 1, 2)
    scaled = partial(F.interpolate, mode="bicubic", antialias=True)
    if Device(frames.device).resizes_bytes:
        return scaled(planes, size=(height, width)).permute(0, 2, 3, 1)
    parts = []
    for part in planes.split(max(1, FLOATS // planes[0].numel())):
        for size in ((planes.shape[2], width), (height, width)):
            part = scaled(part.float(), size=size).round_().clamp_(0, 255)
        parts.append(part.byte())
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).permute(0, 2, 3, 1)


def pixel_patches(frames: torch.Tensor, patch: int = 14, temporal: int = 2, merge: int = 2) -> torch.Tensor:
    """Cut frames into patches in Hugging Face's order.

    Args:
        frames: uint8 `[F, H, W, 3]`. H and W must be multiples of `patch * merge`, and F must be a multiple of `temporal`. If F is
            1, the frame is treated as an image and repeated to fill a frame pair.

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
