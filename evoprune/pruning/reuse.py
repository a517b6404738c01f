"""Reuse in time: finds the units that have not changed since they were last encoded, from the pixels and before the tower runs.

Each unit is compared with the frame pair last encoded at its place, because a comparison with the one just before would miss
slow changes. It has changed if the mean colour of any of its 16 blocks in a frame has: such means average out noise, but not a
stroke one pixel wide. A small drift in the brightness of the whole picture is no change.
"""

from dataclasses import dataclass

import torch

BLOCKS, CHANNELS = 2 * 4**2, 3  # blocks of a unit in both frames, of 7x7 or 8x8 pixels, and colours
# A unit has changed if a block differs by at least this many levels of 255 (Euclidean over red, green and blue).
THRESHOLD = 8.0
# The greatest drift of brightness since the references were encoded, as a factor up or down.
BRIGHTNESS = 1.2


@dataclass(frozen=True)
class ReferenceBlocks:
    """The state between two pieces of a video."""

    means: torch.Tensor  # float32 [units, 96], of each place when last encoded, divided by the frame pair's brightness
    pair: torch.Tensor  # int64 [units], the frame pair that was last encoded at each place
    seen: int  # frame pairs so far


def scan(
    means: torch.Tensor, references: ReferenceBlocks | None = None, threshold: float = THRESHOLD
) -> tuple[torch.Tensor, ReferenceBlocks]:
    """int64 `[T, units]`: the frame pair of the video whose row represents each unit, its own where it is encoded.

    Also what the scan of the next piece takes as `references`; the result does not depend on how the video is cut into pieces.

    `means`: float32 `[T, units, 96]`, from `vision.preprocess.patch_means`: the next frame pairs, at least one. `threshold`: in
    levels of 255; 0 encodes all units.
    """
    seen = references.seen if references else 0
    source = torch.empty(means.shape[:2], dtype=torch.int64, device=means.device)
    held, pair = (references.means, references.pair) if references else (None, torch.zeros_like(source[0]))
    for t, now in enumerate(means):
        if held is None:
            held, changed = now, torch.ones_like(pair, dtype=torch.bool)
        else:
            gain = brightness(now, held)
            changed = differences(now, held * gain) >= threshold
            if 2 * int(changed.sum()) > len(changed):
                # Most of the picture has changed (a cut, or a moving camera), so the measured brightness means nothing.
                gain = torch.ones_like(gain)
                changed = differences(now, held) >= threshold
            held = torch.where(changed[:, None], now / gain, held)
        pair = torch.where(changed, seen + t, pair)
        source[t] = pair
    return source, ReferenceBlocks(held.clone(), pair, seen + len(means))


def differences(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """float32 `[units]`: the greatest difference of a block (float32 `[units, 96]` both), Euclidean over the channels."""
    difference = (means - reference).view(len(means), BLOCKS, CHANNELS)
    return difference.square_().sum(2).amax(1).sqrt_()


def brightness(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """float32 `[96]`: how much brighter the picture is than its references: one factor per channel, repeated for every block.

    The median over units, weighted by brightness, ignores changes in less than half of the picture, and noise in dark regions.
    """
    now, then = (x.view(len(x), BLOCKS, CHANNELS).mean(1) for x in (means, reference))
    ratio, order = (now / then.clamp(min=1e-3)).sort(0)
    weight = then.gather(0, order).cumsum(0)
    middle = (weight < weight[-1] / 2).sum(0, keepdim=True)
    return ratio.gather(0, middle)[0].clamp(1 / BRIGHTNESS, BRIGHTNESS).repeat(BLOCKS)
