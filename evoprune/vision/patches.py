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


def predicted_units(
    patches: torch.Tensor, geo: Geometry, first: int, previous: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict each unit's pixels from its neighbors, as in JPEG-LS, and find the units for which the prediction is exact.

    A unit's neighbors are A on the left, B above, and C above A. The prediction is B if C equals A but not B, and A otherwise. In
    the first row, the prediction is A, and in the first column, it is B. Units that are not predicted by a neighbor may equal the
    unit at the same position in the previous frame pair.

    Args:
        patches: `[pairs * H * W * 4, values]`, the patches of some frame pairs.
        first: The index of the first of these frame pairs.
        previous: The second return value for the preceding frame pairs, or None if there aren't any.

    Returns:
        int64 `[pairs, H * W]`, the unit that predicts each unit's pixels, or the unit itself. Units are numbered across the video.
        The second value is `[1, H, W, values]`, the pixels of the last frame pair.
    """
    x = patches.view(-1, geo.height, geo.width, PATCHES * patches.shape[1])
    a, b = (torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device) for _ in range(2))
    a[:, :, 1:] = (x[:, :, 1:] == x[:, :, :-1]).all(3)  # whether A has the same pixels
    b[:, 1:] = (x[:, 1:] == x[:, :-1]).all(3)
    use_b = torch.zeros_like(b)
    use_b[:, 1:, 0] = True
    use_b[:, 1:, 1:] = b[:, 1:, :-1] & ~a[:, :-1, 1:]  # C equals A, but not B
    before = torch.zeros_like(a)
    earlier = x[:-1]
    if previous is not None:
        earlier = cat([previous, earlier])
    before[len(x) - len(earlier) :] = (x[len(x) - len(earlier) :] == earlier).all(3)
    unit = torch.arange(a.numel(), dtype=torch.int64, device=x.device).view(a.shape) + first * geo.units
    parent = torch.where(before, unit - geo.units, unit)
    parent = torch.where(torch.where(use_b, b, a), torch.where(use_b, unit - geo.width, unit - 1), parent)
    return parent.flatten(1), x[-1:]


def origins(parent: torch.Tensor) -> torch.Tensor:
    """Follow each unit's `parent` (int64 `[N]`) until a unit that is its own parent. Returns int64 `[N]`."""
    while not torch.equal(further := parent[parent], parent):
        parent = further
    return parent
