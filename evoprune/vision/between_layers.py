"""What a plan's stages do with the rows of a chunk between its layers."""

import torch

from evoprune.pruning.encoder_plan import EncoderPlan, SetAside
from evoprune.vision.between import Between
from evoprune.vision.followers import Followers
from evoprune.vision.merging import Merging


def between_layers(plan: EncoderPlan, pairs: range, failed: list[torch.Tensor]) -> Between:
    """For one chunk.

    Args:
        pairs: the frame pairs of the chunk.
        failed: as of `Merging`.

    Raises:
        TypeError: stages that cannot be together in a chunk.
    """
    stages = plan.inside_chunks
    if not stages:
        return Between()
    if isinstance(stages[0].reduce, SetAside) and len(stages) == 1:
        return Followers(stages[0], plan.depth)
    mergers = {stage.reduce.merger for stage in stages if not isinstance(stage.reduce, SetAside)}
    if len(mergers) != 1:
        raise TypeError("the rows of a chunk are merged by one merger, or set aside once")
    left = {stage.first_layer: stage.reduce.left[pairs.start : pairs.stop] for stage in stages}
    return Merging(mergers.pop(), left, failed)
