"""Frames to normalised patches: the resize, and Hugging Face's patch order.

The 2x2 patches of a unit are four consecutive rows, and units are in raster order. A row holds the pixels by channel, frame,
y and x. The result is that of `Qwen2VLImageProcessor`, without torchvision.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from evoprune.backend.devices import to_device
from evoprune.video.plan import InputLimits

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std
CLIP = CLIP_MEAN, CLIP_STD = InputLimits.image_mean, InputLimits.image_std


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes frames (uint8 `[F, H, W, 3]`) by antialiased bicubic interpolation; the result is PIL's within one level of 255."""
    if frames.shape[1:3] == (height, width):
        return frames
    planes = frames.permute(0, 3, 1, 2)
    return F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True).permute(0, 2, 3, 1)


def patchify(
    frames: torch.Tensor,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    patch: int = 14,
    temporal: int = 2,
    merge: int = 2,
) -> torch.Tensor:
    """float32: `pixel_patches`, normalised, as Hugging Face's processors make them."""
    return normalised(pixel_patches(frames, patch, temporal, merge), mean, std)


def pixel_patches(frames: torch.Tensor, patch: int = 14, temporal: int = 2, merge: int = 2) -> torch.Tensor:
    """uint8 `[max(1, F/temporal) * H/patch * W/patch, 3 * temporal * patch * patch]`: patches in Hugging Face's order.

    `frames`: uint8 `[F, H, W, 3]`, F a multiple of `temporal` or 1, for a picture, which fills a frame pair; H and W multiples of
    `patch * merge`.
    """
    frames = frames.expand(temporal, -1, -1, -1) if len(frames) == 1 else frames
    f, h, w, c = frames.shape
    unit = patch * merge
    x = frames.reshape(f // temporal, temporal, h // unit, merge, patch, w // unit, merge, patch, c)
    # pair, unit y, x, patch y, x, channel, frame, y, x
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, c * temporal * patch * patch)


def normalised(
    patches: torch.Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> torch.Tensor:
    """float32, as `patches`, uint8 `[..., values]`: for red, green and blue, on a scale from 0 to 1, less `mean`, over `std`."""
    x = patches.unflatten(-1, (3, -1)).float()
    x -= _by_channel(mean, x.device)
    x /= _by_channel(std, x.device)
    return x.flatten(-2)


@lru_cache(maxsize=32)
def _by_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return to_device(255 * torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1), device)


def patch_means(
    patches: torch.Tensor, units: int, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> torch.Tensor:
    """float32 `[T, units, 96]`: the mean colour of each block of half a patch, 7x7 or 8x8 pixels, in levels of 255.

    `patches`: `[T * units * 4, values]`, of frame pairs and three colours: pixels (uint8), or normalised by `mean` and `std`.
    """
    half = math.isqrt(patches.shape[1] // 24)
    blocks = patches.float().view(-1, units, 2, 2, 3, 2, 2, half, 2, half).mean((7, 9))
    # pair, unit, patch y, x, channel, frame, block y, x -> pair, unit, frame, y, x, channel
    blocks = blocks.permute(0, 1, 5, 2, 6, 3, 7, 4)
    if patches.dtype != torch.uint8:
        blocks = 255 * (blocks * blocks.new_tensor(std) + blocks.new_tensor(mean))
    return blocks.reshape(-1, units, 96)
