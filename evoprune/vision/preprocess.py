"""Frames to normalised patches: the resize, and Hugging Face's patch order.

The 2x2 patches of a unit are four consecutive rows, and units are in raster order. A row holds the pixels by channel, frame,
y and x. The result is that of `Qwen2VLImageProcessor`, without torchvision.
"""

import math

import torch
import torch.nn.functional as F

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
    """float32 `[max(1, F/temporal) * H/patch * W/patch, 3 * temporal * patch * patch]`: patches in Hugging Face's order.

    `frames`: uint8 `[F, H, W, 3]`, F a multiple of `temporal` or 1, for a picture, which fills a frame pair; H and W multiples of
    `patch * merge`. `mean`, `std`: for red, green and blue, on a scale from 0 to 1.
    """
    frames = frames.expand(temporal, -1, -1, -1) if len(frames) == 1 else frames
    f, h, w, c = frames.shape
    unit = patch * merge
    x = frames.reshape(f // temporal, temporal, h // unit, merge, patch, w // unit, merge, patch, c)
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).contiguous().float()  # pair, unit y, x, patch y, x, channel, frame, y, x
    shape = (c, 1, 1, 1)
    x -= 255 * torch.tensor(mean, dtype=torch.float32, device=x.device).view(shape)
    x /= 255 * torch.tensor(std, dtype=torch.float32, device=x.device).view(shape)
    return x.view(-1, c * temporal * patch * patch)


def patch_means(
    patches: torch.Tensor, units: int, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> torch.Tensor:
    """float32 `[T, units, 96]`: the mean colour of each block of half a patch, 7x7 or 8x8 pixels, in levels of 255.

    `patches`: `[T * units * 4, values]`, from `patchify`, of frame pairs and three colours.
    """
    half = math.isqrt(patches.shape[1] // 24)
    blocks = patches.float().view(-1, units, 2, 2, 3, 2, 2, half, 2, half).mean((7, 9))
    # pair, unit, patch y, x, channel, frame, block y, x -> pair, unit, frame, y, x, channel
    blocks = blocks.permute(0, 1, 5, 2, 6, 3, 7, 4)
    levels = 255 * (blocks * blocks.new_tensor(std) + blocks.new_tensor(mean))
    return levels.reshape(-1, units, 96)
