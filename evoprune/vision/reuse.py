"""Reuse in time: finds the units that have not changed since they were last encoded, from the pixels and before the tower runs.

Each unit is compared with the frame pair last encoded at its place, because a comparison with the one just before would miss
slow changes. It has changed if the mean colour of any of its 16 blocks in a frame has: such means average out noise, but not a
stroke one pixel wide. A small drift in the brightness of the whole picture is no change.
"""

from dataclasses import dataclass

import torch

from evoprune.backend.operators import reuse_scan
from evoprune.methods.evoprune import THRESHOLD


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
    held, pair, seen = means[0], means.new_zeros(means.shape[1], dtype=torch.int64), 0
    if references:
        held, pair, seen = references.means, references.pair, references.seen
    source, held, pair = reuse_scan(means, held, pair, references is not None, seen, threshold)
    return source, ReferenceBlocks(held, pair, seen + len(means))
