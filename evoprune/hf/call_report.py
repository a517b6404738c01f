"""The report of one call of a pruned Hugging Face model."""

import threading

from evoprune.backend.devices import environment, memory_in_use, peak_memory
from evoprune.cpu.linear import weights_bytes
from evoprune.hf import interface
from evoprune.hf.columns import Columns
from evoprune.hf.inputs import Visuals
from evoprune.methods.chain import Pipeline
from evoprune.methods.plans import plain
from evoprune.report.records import Memory, ModelFacts, Pruning, Report, Sampling, TokenCounts
from evoprune.session.loading.found import DTYPES
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
    """The report of one call with visuals that are pruned; the caller adds the times. `name`: the method as the user named it.

    `call`, `pruned`: its arguments as given, and as the model gets them. Its own `position_ids` override `positions`.
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
        sampling=Sampling(grid_thw=grids[0] if one else None, seconds_per_pair=visuals.seconds[0] if timed else None),
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


class LatestCalls:
    """The report of each thread's latest call, and the columns left of its prompt. Other threads get those of the latest of all."""

    def __init__(self):
        self._of_thread, self._of_all = threading.local(), (Report(), None)

    def set(self, report: Report, columns: Columns | None = None) -> None:
        self._of_thread.call = self._of_all = report, columns

    def get(self) -> tuple[Report, Columns | None]:
        return getattr(self._of_thread, "call", self._of_all)
