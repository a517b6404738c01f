"""Reuse in time: which units have not changed since they were last encoded, known from the pixels before the tower runs.

Each unit is compared with the frame pair that was last encoded at its place, never with the pair just before, so that slow drift
cannot add up unseen. What is compared are mean colours of blocks of 7x7 pixels: noise averages out in them, a stroke one pixel wide
does not. A unit has changed if any one block has: a mean over the unit would lose a small digit. The brightness of the whole
picture may drift a little without counting as a change. A cut changes everything and so starts new references by itself.
"""

from dataclasses import dataclass

import torch

BLOCKS, CHANNELS = 2 * (28 // 7) ** 2, 3  # blocks of a unit, in both frames
# Levels of 255 by which a block's colour may differ (Euclidean over red, green and blue) before its unit counts as changed.
THRESHOLD = 8.0
# How far the picture's brightness may go from where its references were encoded, as a factor either way.
BRIGHTNESS = 1.2


@dataclass(frozen=True)
class References:
    """What is carried from piece to piece of a video: one reference a place, so bounded.

    Attributes:
        means: float32 `[units, 96]`, block means of each place when it was last encoded, divided by their frame pair's brightness.
        pair: int64 `[units]`, the frame pair last encoded at each place.
        seen: frame pairs so far.
    """

    means: torch.Tensor
    pair: torch.Tensor
    seen: int


def scan(
    means: torch.Tensor, references: References | None = None, threshold: float = THRESHOLD
) -> tuple[torch.Tensor, References]:
    """Goes through the next frame pairs of a video in order. The result does not depend on how the video is cut into pieces.

    Args:
        means: float32 `[T, units, 96]`, from `vision.preprocess.patch_means`, at least one frame pair.
        references: what the scan of the piece before returned; None at the start of a video, whose first pair is encoded whole.
        threshold: levels of 255; a unit with a block that differs by at least so much is encoded. At 0 all are.

    Returns:
        int64 `[T, units]`: the frame pair whose row represents each unit, counted from the video's start; its own if the unit is
        encoded. And what to hand to the next scan.
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
                # Most of the picture is another one: a cut or a moving camera. Then the factor means nothing.
                gain = torch.ones_like(gain)
                changed = differences(now, held) >= threshold
            held = torch.where(changed[:, None], now / gain, held)
        pair = torch.where(changed, seen + t, pair)
        source[t] = pair
    return source, References(held.clone(), pair, seen + len(means))


def differences(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`[units]`: levels by which the block differs that differs most, Euclidean over the channels. Both arguments `[units, 96]`."""
    difference = (means - reference).view(len(means), BLOCKS, CHANNELS)
    return difference.square_().sum(2).amax(1).sqrt_()


def brightness(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How much brighter the picture is than its references, as a factor a channel: `[96]`, repeated for every block.

    The median over the units, weighted with their brightness, so neither what happens in less than half of the picture nor
    the noise of its dark parts moves it.
    """
    now, then = (x.view(len(x), BLOCKS, CHANNELS).mean(1) for x in (means, reference))
    ratio, order = (now / then.clamp(min=1e-3)).sort(0)
    weight = then.gather(0, order).cumsum(0)
    middle = (weight < weight[-1] / 2).sum(0, keepdim=True)
    return ratio.gather(0, middle)[0].clamp(1 / BRIGHTNESS, BRIGHTNESS).repeat(BLOCKS)
