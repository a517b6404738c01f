"""Plan an input: which frames are read, at which size, and how they are encoded.

A plan is final before the model is loaded. This file imports no torch.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from evoprune.session.loading.description import ModelDescription
from evoprune.session.options import PruneOptions
from evoprune.video import Plan, SamplingOptions, Video, choose_decoder

if TYPE_CHECKING:
    from evoprune.methods import PruneConfig


def plan_input(
    model: ModelDescription,
    info: Video,
    sampling: SamplingOptions,
    pruning: "PruneConfig | PruneOptions | None" = None,
    name: str | None = None,
) -> Plan:
    """Plan which frames of a video to sample, or at which size to read a picture, and how to encode them.

    Args:
        model: The model that will read the input.
        info: Metadata of the input.
        sampling: Options for choosing frames. Without `max_visual_tokens`, the model's default applies.
        pruning: The pruning settings, or None for no pruning. A method that may make inputs smaller is consulted now, which imports
            torch.
        name: Name for reports; defaults to the path.

    Raises:
        VideoError: If the duration is unknown, the time span is empty, or the shape cannot be resized.
        UsageError: If a time span is given for a picture, or the decoder is unknown or not installed.
    """
    limits = model.limits[info.kind]
    decoder = choose_decoder(sampling.decoder, info)
    if sampling.max_visual_tokens is None:
        sampling = replace(sampling, max_visual_tokens=model.max_visual_tokens)
    plan = replace(
        Plan.of(info, limits, sampling),
        tower=model.tower,
        pruning=pruning,
        name=name or info.path,
        decoder=decoder,
        seek=sampling.seek,
    )
    if pruning is None or not pruning.resizes:
        return plan
    return replace(plan.shrunk(plan.encoder.grid, limits), unshrunk=plan)
