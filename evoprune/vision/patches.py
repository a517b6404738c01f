"""Prepares patches for the vision tower: groups them into frame pairs, normalizes them, and finds unchanged units.

`scan` finds the units that have not changed since they were last encoded. It runs before the tower and looks only at pixels. Each
unit is compared with the last encoded unit at the same position, because comparing it with the previous frame pair would miss slow
changes. In each frame, a unit is divided into 16 blocks. The unit has changed if any block's mean color has changed. Averaging over
a block removes noise, but even a one-pixel-wide stroke still changes the mean. Small drifts in overall brightness are ignored.
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

# The mean and standard deviation of red, green, and blue, on a scale from 0 to 1.
Normal = tuple[tuple[float, ...], tuple[float, ...]]
CLIP: Normal = InputLimits.image_mean, InputLimits.image_std


def in_pairs(patches: Iterable[torch.Tensor], geo: Geometry, pairs: int, units: int) -> Iterator[torch.Tensor]:
    """Regroup a video's patches into pieces of complete frame pairs.

    Each piece except the last contains as few frame pairs as possible, but at least `units` units.

    Args:
        patches: The patches in pieces of any size, each `[n, values]`. The pieces are moved to the device of `geo`.
        pairs: The number of frame pairs in the video.

    Raises:
        ValueError: If the number of patches doesn't match `pairs` frame pairs.
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
            if rows > size:  # an empty slice would keep the whole tensor in memory
                pending.append(joined[size:])
    if left:
        raise ValueError(f"the number of patches does not match {pairs} frame pairs of {geo.units} units")
    if pending:
        yield torch.cat(pending)


def normalised(patches: torch.Tensor, normal: Normal = CLIP) -> torch.Tensor:
    """Normalize patches (uint8 `[..., values]`). Returns float32 values in the same shape.

    Colors are scaled to the range from 0 to 1, then the mean is subtracted, and the result is divided by the standard deviation.
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
    """Compute the mean block colors in each unit, on a scale from 0 to 255. Returns float32 `[T, units, 96]`.

    Each patch is divided into four blocks of 7x7 or 8x8 pixels, so a unit has 16 blocks in each of its two frames. With three
    colors, this makes 96 means.

    Args:
        patches: `[T * units * 4, values]`, the patches of T frame pairs, either uint8 or normalized.
        units: The number of units per frame pair.
        normal: The mean and standard deviation used to normalize the patches. Ignored for uint8.
    """
    half = math.isqrt(patches.shape[1] // 24)
    blocks = patches.float().view(-1, units, 2, 2, 3, 2, 2, half, 2, half).mean((7, 9))
    # pair, unit, patch y, x, channel, frame, block y, x -> pair, unit, frame, y, x, channel
    blocks = blocks.permute(0, 1, 5, 2, 6, 3, 7, 4)
    if patches.dtype != torch.uint8:  # the patches were normalized by a processor, so undo this
        mean, std = map(blocks.new_tensor, normal)
        blocks = 255 * (blocks * std + mean)
    return blocks.reshape(-1, units, 96)


@dataclass(frozen=True)
class ReferenceBlocks:
    """State carried over by `scan` from one piece of a video to the next."""

    # float32 `[units, 96]`: for each position, the block means of the last encoded unit, divided by the brightness of its frame
    # pair
    means: torch.Tensor
    pair: torch.Tensor  # int64 `[units]`: for each position, the frame pair of the last encoded unit
    seen: int  # the number of frame pairs scanned so far


def scan(
    means: torch.Tensor, references: ReferenceBlocks | None = None, *, threshold: float
) -> tuple[torch.Tensor, ReferenceBlocks]:
    """Find the units in the next piece of a video that don't need to be encoded again.

    The result doesn't depend on how the video is split into pieces.

    Args:
        means: float32 `[T, units, 96]`, the result of `patch_means` for at least one frame pair.
        references: The state after the previous piece. None for the first piece.
        threshold: The minimum difference to treat as a change, on a scale of 0 to 255. With 0, all units are encoded.

    Returns:
        int64 `[T, units]`, the frame pair whose row represents each unit. Units that need to be encoded map to their own frame
        pair. The second value is the state for the next piece.
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
