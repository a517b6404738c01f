"""The plan of an input: what is read of it, and what the encoder does with it.

It is final before the model is loaded. Imports no torch.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from evoprune.session.loading.description import ModelDescription
from evoprune.session.options import PruneOptions, SamplingOptions
from evoprune.video import Plan, Video, choose_decoder, make_plan

if TYPE_CHECKING:
    from evoprune.methods import PruneConfig


def plan_input(
    model: ModelDescription,
    info: Video,
    sampling: SamplingOptions,
    pruning: "PruneConfig | PruneOptions | None" = None,
    name: str | None = None,
) -> Plan:
    """Plan which frames of a video are looked at, or how large a picture, and what the encoder does with them.

    Args:
        pruning: None for nothing pruned. A method that makes inputs smaller is asked now, which imports torch.
        name: for reports; None for the path.

    Raises:
        VideoError: an unknown duration, an empty span, or a shape that cannot be resized. UsageError: a span of a picture; an
            unknown or missing decoder.
    """
    limits = model.limits[info.kind]
    decoder = choose_decoder(sampling.decoder, info)
    if sampling.max_visual_tokens is None:
        sampling = replace(sampling, max_visual_tokens=model.max_visual_tokens)
    plan = replace(
        make_plan(info, limits, sampling),
        tower=model.tower,
        pruning=pruning,
        name=name or info.path,
        decoder=decoder,
        seek=sampling.seek,
    )
    if pruning is None or not pruning.resizes:
        return plan
    return replace(plan.shrunk(plan.encoder.grid, limits), unshrunk=plan)
