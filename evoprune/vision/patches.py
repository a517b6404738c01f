"""Prepare patches for the tower: group them into frame pairs, normalize them, and find unchanged units.

Reuse (`scan`) finds the units that have not changed since they were last encoded, using only pixels, before the tower runs. A unit
is compared with the frame pair that was last encoded at its place, because a comparison with the previous frame pair would miss
slow changes. It has changed if the mean color of any of its 16 blocks in a frame has changed: such means average out noise, but
not a stroke one pixel wide. A small drift in the brightness of the whole image does not count as a change.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from evoprune.backend import reuse_scan, to_device
from evoprune.model import PATCHES
from evoprune.video import InputLimits
from evoprune.vision.layout import Geometry, cat

# Mean and standard deviation of red, green and blue, on a scale from 0 to 1.
Normal = tuple[tuple[float, ...], tuple[float, ...]]
CLIP: Normal = InputLimits.image_mean, InputLimits.image_std


def in_pairs(patches: Iterable[torch.Tensor], geo: Geometry, pairs: int, units: int) -> Iterator[torch.Tensor]:
    """Yield the patches of a video in pieces of `units` units, rounded up to whole frame pairs. The last piece may be smaller.

    Args:
        patches: pieces `[n, values]` of any size. They are moved to the device of `geo`.
        pairs: number of frame pairs in the video.

    Raises:
        ValueError: the number of patches does not match `pairs` frame pairs.
    """
    device = torch.device(geo.device)
    of_pair = geo.units * PATCHES
    size = -(-units // geo.units) * of_pair
    left = pairs * of_pair
    pending = []
    for piece in patches:
        left -= len(piece)
        if left < 0:
            break
        if len(piece):
            pending.append(to_device(piece, device))
        while (rows := sum(map(len, pending))) >= size:
            joined = cat(pending)
            yield joined[:size]
            pending = []
            if rows > size:  # do not hold an empty piece
                pending.append(joined[size:])
    if left:
        raise ValueError(f"the number of patches does not match {pairs} frame pairs of {geo.units} units")
    if pending:
        yield torch.cat(pending)


def normalised(patches: torch.Tensor, normal: Normal = CLIP) -> torch.Tensor:
    """Normalize patches, uint8 `[..., values]`: scale colors to 0 to 1, subtract the mean and divide by the standard deviation.

    Returns:
        float32 of the same shape.
    """
    x = patches.unflatten(-1, (3, -1)).float()
    mean, std = normal
    x -= _by_channel(mean, x.device)
    x /= _by_channel(std, x.device)
    return x.flatten(-2)


@lru_cache(maxsize=32)
def _by_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return to_device(255 * torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1), device)


def patch_means(patches: torch.Tensor, units: int, normal: Normal = CLIP) -> torch.Tensor:
    """Return the mean color of each block with half a patch's side (7x7 or 8x8 pixels), 0 to 255: float32 `[T, units, 96]`.

    Args:
        patches: `[T * units * 4, values]`, patches of frame pairs with three colors; uint8, or normalized.
        units: number of units per frame pair.
        normal: mean and standard deviation that the patches were normalized with; ignored for uint8.
    """
    half = math.isqrt(patches.shape[1] // 24)
    blocks = patches.float().view(-1, units, 2, 2, 3, 2, 2, half, 2, half).mean((7, 9))
    # pair, unit, patch y, x, channel, frame, block y, x -> pair, unit, frame, y, x, channel
    blocks = blocks.permute(0, 1, 5, 2, 6, 3, 7, 4)
    if patches.dtype != torch.uint8:  # from a processor; undo the normalization
        mean, std = map(blocks.new_tensor, normal)
        blocks = 255 * (blocks * std + mean)
    return blocks.reshape(-1, units, 96)


@dataclass(frozen=True)
class ReferenceBlocks:
    """State of `scan` between two pieces of a video."""

    # float32 `[units, 96]`, block means of each place when it was last encoded, divided by the frame pair's brightness
    means: torch.Tensor
    pair: torch.Tensor  # int64 `[units]`, the frame pair that was last encoded at each place
    seen: int  # number of frame pairs so far


def scan(
    means: torch.Tensor, references: ReferenceBlocks | None = None, *, threshold: float
) -> tuple[torch.Tensor, ReferenceBlocks]:
    """Find the units to reuse in the next frame pairs. The result does not depend on how the video is cut into pieces.

    Args:
        means: float32 `[T, units, 96]`, result of `patch_means` for at least one frame pair.
        references: the state after the previous piece; None for the first piece.
        threshold: smallest difference that counts as a change, on a scale of 255; 0 encodes all units.

    Returns:
        The frame pair whose row represents each unit, int64 `[T, units]` (the unit's own frame pair if the unit is encoded); and
        the state for the next piece.
    """
    reference_means = means[0]
    pair = means.new_zeros(means.shape[1], dtype=torch.int64)
    seen = 0
    if references:
        reference_means = references.means
        pair = references.pair
        seen = references.seen
    source, reference_means, pair = reuse_scan(means, reference_means, pair, references is not None, seen, threshold)
    return source, ReferenceBlocks(reference_means, pair, seen + len(means))
