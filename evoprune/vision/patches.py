"""Patches on their way into the tower: whole frame pairs, normalised, and without what has not changed.

Reuse (`scan`) finds the units that have not changed since they were last encoded, from the pixels and before the tower runs. Each
unit is compared with the frame pair last encoded at its place, because a comparison with the one just before would miss slow
changes. It has changed if the mean colour of any of its 16 blocks in a frame has: such means average out noise, but not a stroke
one pixel wide. A small drift in the brightness of the whole picture is no change.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from evoprune.backend import devices, reuse_scan
from evoprune.model import PATCHES
from evoprune.video import InputLimits
from evoprune.vision.layout import Geometry
from evoprune.vision.preprocess import pixel_patches

# Mean and standard deviation of red, green and blue, on a scale from 0 to 1.
Normal = tuple[tuple[float, ...], tuple[float, ...]]
CLIP: Normal = InputLimits.image_mean, InputLimits.image_std


def in_pairs(patches: Iterable[torch.Tensor], geo: Geometry, pairs: int, units: int) -> Iterator[torch.Tensor]:
    """Yield the patches of a video, of `units` units at a time, rounded up to whole frame pairs; the last may be fewer.

    Args:
        patches: `[n, values]`, of `pairs` frame pairs, in pieces. They are moved to the device of `geo`.

    Raises ValueError: the number of patches does not fit `pairs` frame pairs.
    """
    device = torch.device(geo.device)
    of_pair = geo.units * PATCHES
    size = -(-units // geo.units) * of_pair
    left = pairs * of_pair
    held = []
    for piece in patches:
        left -= len(piece)
        if left < 0:
            break
        if len(piece):
            held.append(devices.to_device(piece, device))
        while (have := sum(map(len, held))) >= size:
            joined = devices.cat(held)
            yield joined[:size]
            held = []
            if have > size:  # never an empty piece
                held.append(joined[size:])
    if left:
        raise ValueError(f"there are not as many patches as {pairs} frame pairs of {geo.units} units have")
    if held:
        yield torch.cat(held)


def normalised(patches: torch.Tensor, normal: Normal = CLIP) -> torch.Tensor:
    """Return float32, as `patches`, uint8 `[..., values]`: colours on a scale from 0 to 1, less the mean, over the deviation."""
    x = patches.unflatten(-1, (3, -1)).float()
    mean, std = normal
    x -= _by_channel(mean, x.device)
    x /= _by_channel(std, x.device)
    return x.flatten(-2)


@lru_cache(maxsize=32)
def _by_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return devices.to_device(255 * torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1), device)


def patchify(
    frames: torch.Tensor, normal: Normal = CLIP, patch: int = 14, temporal: int = 2, merge: int = 2
) -> torch.Tensor:
    """Return float32: `pixel_patches`, normalised, as Hugging Face's processors make them."""
    return normalised(pixel_patches(frames, patch, temporal, merge), normal)


def patch_means(patches: torch.Tensor, units: int, normal: Normal = CLIP) -> torch.Tensor:
    """Return float32 `[T, units, 96]`: the mean colour of each block of half a patch, 7x7 or 8x8 pixels, in levels of 255.

    `patches`: `[T * units * 4, values]`, of frame pairs and three colours; uint8, or `normal`ised.
    """
    half = math.isqrt(patches.shape[1] // 24)
    blocks = patches.float().view(-1, units, 2, 2, 3, 2, 2, half, 2, half).mean((7, 9))
    # pair, unit, patch y, x, channel, frame, block y, x -> pair, unit, frame, y, x, channel
    blocks = blocks.permute(0, 1, 5, 2, 6, 3, 7, 4)
    if patches.dtype != torch.uint8:  # of a processor, whose pixels nobody has
        mean, std = map(blocks.new_tensor, normal)
        blocks = 255 * (blocks * std + mean)
    return blocks.reshape(-1, units, 96)


@dataclass(frozen=True)
class ReferenceBlocks:
    """The state between two pieces of a video."""

    means: torch.Tensor  # float32 [units, 96], of each place when last encoded, divided by the frame pair's brightness
    pair: torch.Tensor  # int64 [units], the frame pair that was last encoded at each place
    seen: int  # frame pairs so far


def scan(
    means: torch.Tensor, references: ReferenceBlocks | None = None, *, threshold: float
) -> tuple[torch.Tensor, ReferenceBlocks]:
    """Return int64 `[T, units]`: the frame pair of the video whose row represents each unit, its own where it is encoded.

    Also what the scan of the next piece takes as `references`; the result does not depend on how the video is cut into pieces.

    `means`: float32 `[T, units, 96]`, from `patch_means`: the next frame pairs, at least one. `threshold`: in
    levels of 255; 0 encodes all units.
    """
    held = means[0]
    pair = means.new_zeros(means.shape[1], dtype=torch.int64)
    seen = 0
    if references:
        held = references.means
        pair = references.pair
        seen = references.seen
    source, held, pair = reuse_scan(means, held, pair, references is not None, seen, threshold)
    return source, ReferenceBlocks(held, pair, seen + len(means))
