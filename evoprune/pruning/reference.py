"""Redundancy in time: which units have not changed since they were last encoded, known from the pixels before the tower runs.

Each unit is compared with the same place in its *reference*, the grid last encoded there, never with the grid just before, so
that slow drift cannot add up unseen. What is compared are means over blocks of 7x7 pixels: noise averages out in them, a stroke a
pixel wide does not. A unit has changed if any one block's colour has: a mean over the unit would lose a small digit. The
brightness of the whole picture may drift a little without anything being news. A cut changes everything and so starts new
references by itself.

A unit's feature is not of its pixels alone: attention has put into it what else the grid holds. So the feature of a unit that has
not changed grows stale where others have, and with nothing but stale ones a model reads wrong how many things are left. Against
that, some of the places can be encoded anew in every grid in which something has changed, others in each, all in turn: the cyclic
intra refresh of video coding.

How statistics and thresholds compare, on clips through codecs: `python -m evoprune.demo.changes`.
"""

import math
from dataclasses import dataclass

import torch

UNIT, BLOCK, FRAMES, CHANNELS = 28, 7, 2, 3
BLOCKS = FRAMES * (UNIT // BLOCK) ** 2  # of a unit
# Levels of 255 by which a block's colour may differ (Euclidean over red, green and blue) before its unit counts as changed.
THRESHOLD = 8.0
# How far the picture's brightness may go from where its references were encoded, as a factor either way.
BRIGHTNESS = 1.2


def block_means(frames: torch.Tensor) -> torch.Tensor:
    """The mean colour of each block of 7x7 pixels.

    Args:
        frames: uint8 `[2 * G, H, W, 3]`, of the size that the encoder will see, H and W multiples of 28.

    Returns:
        float32 `[G, units, 2 * 16 * 3]`, levels of 255; units in raster order, a unit's values by frame, block y, block x, channel.
    """
    f, h, w, c = frames.shape
    rows = frames.view(f, h // BLOCK, BLOCK, w * c).sum(2, dtype=torch.int16)
    # Columns by a matrix product with ones: whole numbers, so exact whatever the number of frames.
    ones = torch.eye(c, device=frames.device).repeat(BLOCK, 1)
    means = (rows.float().view(-1, BLOCK * c) @ ones).div_(BLOCK * BLOCK)
    side = UNIT // BLOCK
    means = means.view(f // FRAMES, FRAMES, h // UNIT, side, w // UNIT, side, c).permute(0, 2, 4, 1, 3, 5, 6)
    return means.reshape(f // FRAMES, h // UNIT * (w // UNIT), BLOCKS * c)


@dataclass(frozen=True)
class References:
    """What is carried from piece to piece of a video: one reference a place, so bounded.

    Attributes:
        means: float32 `[units, 96]`, block means where last encoded, divided by their grid's brightness.
        grid: int64 `[units]`, the grid last encoded at each place.
        seen: grids so far.
    """

    means: torch.Tensor
    grid: torch.Tensor
    seen: int


@dataclass(frozen=True)
class Reuse:
    """Which units of some grids are encoded, and whose row stands for the others.

    Attributes:
        encoded: bool `[G, units]`.
        grid: int64 `[G, units]`, the grid whose row at the same place stands for the unit, counted from the video's start; the
            unit's own grid if it is encoded.
    """

    encoded: torch.Tensor
    grid: torch.Tensor

    @property
    def counts(self) -> list[int]:
        """Rows of each grid when it enters the tower."""
        return self.encoded.sum(1).tolist()

    def owner(self) -> torch.Tensor:
        """int64 `[G * units]`: the row of each unit if the encoded units of a whole video are numbered in their order."""
        units = self.encoded.shape[1]
        number = self.encoded.flatten().cumsum(0) - 1
        return number[(self.grid * units + torch.arange(units, device=self.grid.device)).flatten()]


def joined(pieces: list[Reuse]) -> Reuse:
    """The pieces of a video as one."""
    return Reuse(torch.cat([p.encoded for p in pieces]), torch.cat([p.grid for p in pieces]))


def scan(
    means: torch.Tensor, references: References | None = None, threshold: float = THRESHOLD, refresh: int = 0
) -> tuple[Reuse, References]:
    """Goes through the next grids of a video, in their order. The result does not depend on how the video is cut into pieces.

    Args:
        means: `[G, units, 96]`, from `block_means`.
        references: what the scan of the piece before returned; None at the start of a video, whose first grid is encoded whole.
        threshold: levels of 255; a unit with a block that differs by at least so much is encoded. At 0 all are.
        refresh: in so many grids each place has its turn to be encoded anew, changed or not, if anything in the grid has; 0 for
            never.

    Returns:
        What to encode of these grids, and what to hand to the next scan.
    """
    seen = references.seen if references else 0
    encoded = torch.empty(means.shape[:2], dtype=torch.bool, device=means.device)
    owner = torch.empty(means.shape[:2], dtype=torch.int64, device=means.device)
    held = references.means.clone() if references else None
    grid = references.grid.clone() if references else torch.zeros_like(owner[0]) if len(owner) else None
    turn = turns(means.shape[1], refresh).to(means.device) if refresh else None
    for g, now in enumerate(means):
        if held is None:
            held, changed = now.clone(), torch.ones_like(encoded[g])
        else:
            gain = brightness(now, held)
            changed = differences(now, held * gain) >= threshold
            if 2 * int(changed.sum()) > len(changed):
                # Most of the picture is another one: a cut or a moving camera. Then the factor means nothing.
                gain = torch.ones_like(gain)
                changed = differences(now, held) >= threshold
            if refresh and changed.any():
                changed |= turn == (seen + g) % refresh
            held = torch.where(changed[:, None], now / gain, held)
        grid = torch.where(changed, seen + g, grid)
        encoded[g], owner[g] = changed, grid
    if held is None:
        raise ValueError("nothing to scan: no grids, and no references")
    return Reuse(encoded, owner), References(held, grid, seen + len(means))


def turns(units: int, refresh: int) -> torch.Tensor:
    """int64 `[units]`: which grid of every `refresh` is each place's turn. Steps of the golden ratio, so each turn's places lie
    evenly, and are equally many to within a few."""
    golden = (math.sqrt(5) - 1) / 2
    return (torch.arange(units, dtype=torch.float64) * golden % 1 * refresh).long()


def differences(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`[units]`: by how many levels the block differs that differs most (Euclidean over the channels). Both `[units, 96]`."""
    apart = (means - reference).view(len(means), BLOCKS, CHANNELS)
    return apart.square_().sum(2).amax(1).sqrt_()


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
