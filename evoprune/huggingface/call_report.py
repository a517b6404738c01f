"""The report of one call of a pruned Hugging Face model."""

import threading
from dataclasses import dataclass, field

from evoprune.huggingface import interface
from evoprune.huggingface.columns import Columns
from evoprune.huggingface.inputs import Visuals
from evoprune.methods.pipeline import Pipeline
from evoprune.model.linear import weights_bytes
from evoprune.model.machine import environment, memory_in_use, peak_memory
from evoprune.pipeline.loading.found import DTYPES
from evoprune.pruning.budget import plain
from evoprune.report.records import Memory, ModelFacts, Pruning, Report, Sampling, TokenCounts
from evoprune.vision.encoded import Encoded


def call_report(
    model,
    call: dict,
    pruned: dict,
    visuals: Visuals,
    encoded: Encoded,
    name: str,
    method: Pipeline,
    budget: float,
    positions: str,
) -> Report:
    """The report of one call with videos or pictures that are pruned; the caller adds the times.

    `call` and `pruned` are its arguments, as the user gave them and as the model gets them; `visuals` and `encoded` what was
    pruned, and what became of it; `name` the method as the user named it. The call's own `position_ids` override `positions`.
    """
    device, units = str(model.device), len(encoded.owner)
    mask, grids = pruned.get("attention_mask"), visuals.grids.tolist()
    prompt = pruned["input_ids"].numel() if mask is None else int(mask.sum())
    tokens = (call["input_ids"] == model.config.image_token_id) | (call["input_ids"] == model.config.video_token_id)
    visual = len(encoded.kept) + int(tokens.sum()) - units  # those that are not pruned stay
    whole = ["pictures_whole"] if interface.has_picture(call) and all(visuals.videos) else []
    one = len(grids) == 1
    timed = one and visuals.videos[0] and (call.get("second_per_grid_ts") is not None or interface.has_clock(model))
    return Report(
        sampling=Sampling(
            grid_thw=grids[0] if one else None,
            seconds_per_pair=visuals.seconds[0] if timed else None,
        ),
        pruning=Pruning(
            method=name,
            args=method.args,
            budget=plain(method.reported_budget(budget)),
            kept_ratio=len(encoded.kept) / units,
            visual_tokens_in=units,
            visual_tokens_kept=len(encoded.kept),
            encoder_rows=len(encoded.rows),
            encoder_live_share=encoded.live_share,
            layers=[list(layer) for layer in encoded.layers],
            kept_per_pair=encoded.kept_per_pair,
            positions=positions if call.get("position_ids") is None else "given",
        ),
        tokens=TokenCounts(prompt - visual, visual, prompt),
        memory=Memory(weights_bytes(model), peak_memory(device), *memory_in_use(device)),
        model=ModelFacts(
            id=model.name_or_path or type(model).__name__,
            dtype=next((name for name, dtype in DTYPES.items() if dtype == model.dtype), str(model.dtype)),
            device=device,
        ),
        env=environment(device),
        warnings=[*whole, *(["equal_scores"] if encoded.flat else [])],
    )


@dataclass(frozen=True)
class LatestCall:
    """A call's report, and the columns of its prompt that are left. Where nothing was encoded here, a warning says why."""

    report: Report = field(default_factory=Report)
    columns: Columns | None = None


class LatestCalls:
    """The latest call of each thread; for a thread that has made none, the latest call of all."""

    def __init__(self):
        self._of_thread, self._of_all = threading.local(), LatestCall()

    def set(self, call: LatestCall) -> None:
        self._of_thread.call = self._of_all = call

    def get(self) -> LatestCall:
        return getattr(self._of_thread, "call", self._of_all)
