"""The way of frames to the patches of rows: the resize, Hugging Face's patch order, and what has not changed.

1. `resize` and `pixel_patches` make patches of uint8 frames. The 2x2 patches of a unit are four consecutive rows, and units are in
   raster order. A row holds the pixels by channel, frame, y and x. `normalised`, the result is that of `Qwen2VLImageProcessor`,
   without torchvision.
2. Reuse (`scan`) finds the units that have not changed since they were last encoded, from the pixels and before the tower runs.
   Each unit is compared with the frame pair last encoded at its place, because a comparison with the one just before would miss
   slow changes. It has changed if the mean colour of any of its 16 blocks in a frame has: such means average out noise, but not a
   stroke one pixel wide. A small drift in the brightness of the whole picture is no change.
3. `row_patches` does so piece by piece, each of some whole frame pairs. Of a unit that needs no row only the number of its
   reference is kept.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from evoprune.backend import devices
from evoprune.backend.operators import reuse_scan
from evoprune.backend.pixels import resized
from evoprune.methods.types import arange_on, cat
from evoprune.model.config import PATCHES
from evoprune.video.plan import InputLimits, Plan
from evoprune.vision.layout import Geometry, window_order

# Mean and standard deviation of red, green and blue, on a scale from 0 to 1.
Normal = tuple[tuple[float, ...], tuple[float, ...]]
CLIP: Normal = InputLimits.image_mean, InputLimits.image_std
# The most by which a device shrinks a side of a frame: torch's kernel for CUDA refuses to shrink one far more.
MAX_SHRINK = 32


def patches_of(frames: np.ndarray, plan: Plan, limits: InputLimits, device: torch.device) -> torch.Tensor:
    """Return uint8 `[rows, values]` on `device`: the patches of frames uint8 `[n, height, width, 3]`, resized as planned.

    The frames go to the device as they are, once, and are resized and cut there.
    """
    pixels, (height, width) = torch.from_numpy(frames), frames.shape[1:3]
    if max(height / plan.height, width / plan.width) > MAX_SHRINK:
        pixels = resize(pixels, plan.height, plan.width)
    resized = resize(devices.to_device(pixels, device), plan.height, plan.width)
    return pixel_patches(resized, limits.patch_size, limits.temporal_patch_size, limits.merge_size)


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes frames (uint8 `[F, H, W, 3]`) by antialiased bicubic interpolation; the result is PIL's within one level of 255."""
    if frames.shape[1:3] == (height, width):
        return frames
    return resized(frames.permute(0, 3, 1, 2), height, width).permute(0, 2, 3, 1)


def patchify(
    frames: torch.Tensor, normal: Normal = CLIP, patch: int = 14, temporal: int = 2, merge: int = 2
) -> torch.Tensor:
    """Return float32: `pixel_patches`, normalised, as Hugging Face's processors make them."""
    return normalised(pixel_patches(frames, patch, temporal, merge), normal)


def pixel_patches(frames: torch.Tensor, patch: int = 14, temporal: int = 2, merge: int = 2) -> torch.Tensor:
    """Return uint8 `[max(1, F/temporal) * H/patch * W/patch, 3 * temporal * patch * patch]`: patches in Hugging Face's order.

    `frames`: uint8 `[F, H, W, 3]`, F a multiple of `temporal` or 1, for a picture, which fills a frame pair; H and W multiples of
    `patch * merge`.
    """
    if len(frames) == 1:
        frames = frames.expand(temporal, -1, -1, -1)
    f, h, w, c = frames.shape
    unit = patch * merge
    x = frames.reshape(f // temporal, temporal, h // unit, merge, patch, w // unit, merge, patch, c)
    # pair, unit y, x, patch y, x, channel, frame, y, x
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, c * temporal * patch * patch)


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


@dataclass(frozen=True)
class RowPatches:
    """The patches of some neighbouring whole frame pairs, of the units that are rows."""

    patches: torch.Tensor  # `[R, 4, values]`, normalised, in window order
    unit: torch.Tensor  # int64 `[R]`, the unit of each row, counted from the first frame pair of the video
    counts: tuple[int, ...]  # rows of each frame pair
    # int64 `[pairs, H*W]`, the number of the frame pair whose row represents each unit: its own if the unit is a row. A negative
    # number is one before this video.
    source: torch.Tensor
    references: ReferenceBlocks | None  # of reuse, behind these frame pairs; None without reuse


def in_pairs(patches: Iterable[torch.Tensor], rows_per_pair: int, pairs: int) -> Iterator[torch.Tensor]:
    """Cuts a stream of patches (pieces `[n, values]`) into pieces of `pairs` whole frame pairs; the last may be shorter."""
    held = []
    size = rows_per_pair * pairs
    for piece in patches:
        if not len(piece):
            continue
        held.append(piece)
        while (have := sum(map(len, held))) >= size:
            joined = cat(held)
            yield joined[:size]
            held = []
            if have > size:  # never an empty piece
                held.append(joined[size:])
    if held:
        yield torch.cat(held)


def row_patches(
    patches: Iterable[torch.Tensor],
    geo: Geometry,
    pairs: int,
    *,
    normal: Normal,
    units: int,
    threshold: float,
    dtype: torch.dtype,
    timer: devices.Timer,
    one_colour: list[torch.Tensor] | None = None,
    references: ReferenceBlocks | None = None,
) -> Iterator[RowPatches]:
    """Yields the patches of the rows of a video, of `units` units at a time, rounded up to whole frame pairs.

    Args:
        patches: `[n, values]`, of `pairs` frame pairs, in pieces: pixels (uint8), or already `normal`ised, as by a processor.
        threshold: of reuse, in levels of 255; 0 for no reuse. `timer` measures the search for references.
        one_colour: a list to which each piece adds whether each of its frame pairs has one colour, until one has not; or None.
        references: of what comes before the video, if there is anything. A unit that it represents has a negative source.

    Raises ValueError: the number of patches does not fit `pairs` frame pairs.
    """
    device = torch.device(geo.device)
    done = 0
    moved = (devices.to_device(piece, device) for piece in patches)
    for piece in in_pairs(moved, geo.units * PATCHES, -(-units // geo.units)):
        count, rest = divmod(len(piece), geo.units * PATCHES)
        if rest or done + count > pairs:
            raise ValueError(f"patches do not add up to {pairs} frame pairs of {geo.units} units")
        if one_colour is not None and not (one_colour and devices.known_false(one_colour[-1])):
            of_pair = piece.view(count, -1, piece.shape[1])  # one colour: all patches are equal within one level of 255
            one_colour.append((of_pair.amax(1) - of_pair.amin(1)).max() < 1 / 255)
        own = done + arange_on(count, device)[:, None]
        source = own.expand(count, geo.units)
        alive = None
        counts = (geo.units,) * count
        if threshold:
            with timer:
                means = patch_means(piece, geo.units, normal)
                source, references = scan(means, references, threshold=threshold)
                alive = source == own
                counts = tuple(alive.sum(1).tolist())  # which waits for an accelerator, once for each piece
        unit = window_order(geo, count, alive, sum(counts))
        values = piece.view(-1, PATCHES, piece.shape[1])[unit]
        if values.dtype == torch.uint8:
            values = normalised(values, normal)
        if done:
            unit = unit + done * geo.units
        yield RowPatches(values.to(dtype), unit, counts, source, references)
        done += count
    if done != pairs:
        raise ValueError(f"patches end after {done} of {pairs} frame pairs")
