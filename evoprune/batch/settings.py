"""The options of a batch, as records hold them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from evoprune import methods
from evoprune.backend.limits import check_libraries
from evoprune.errors import ModelError
from evoprune.methods.budget import TUNED
from evoprune.session.options import PipelineOptions, record
from evoprune.session.saved import Tuned, resolve

if TYPE_CHECKING:
    from evoprune.session.loading.found import FoundModel
    from evoprune.video_qa import VideoQA

# Options that records hold also at their defaults, as the first version's did; the others where they differ from these.
RECORDED = (
    "model", "revision", "dtype", "quantize", "load_format", "budget", "method", "method_args", "seed", "fps", "frames",
    "max_frames", "max_visual_tokens", "decoder", "max_new_tokens", "temperature", "top_p", "system",
)  # fmt: skip


@dataclass(frozen=True)
class Settings(PipelineOptions):
    """The options of a batch. Each row has its own part of the video instead of `start_s` and `end_s`."""

    tuned: Tuned | None = None  # the tuned setting that `pruning` comes from; None if it was given
    found: "FoundModel | None" = None  # the model, where it is found already

    def resolved(self) -> "Settings":
        """With plain values for a budget of "tuned". Raises UsageError: there are none. ModelError: the model cannot be found."""
        if self.pruning.budget != TUNED:
            return self
        check_libraries()
        from evoprune.session.loading.found import find_model

        found = find_model(self.model)
        pruning, tuned = resolve(self.pruning, self.model.model, lambda: found.weights_fingerprint)
        return replace(self, pruning=pruning, tuned=tuned, found=found)

    def resolved_here(self) -> "Settings":
        """As `resolved` where the model's files are on this machine, else unchanged. The model may run on another one."""
        here = replace(self.model, offline=True, device="cpu", quantize="none")
        try:
            return replace(replace(self, model=here).resolved(), model=self.model, found=None)
        except ModelError:
            return self

    def load(self, progress: Callable[[int, int], None] | None = None) -> "VideoQA":
        """Loads the model; raises what `VideoQA.load` raises."""
        from evoprune.video_qa import load_qa

        return load_qa(self.found or self.model, self.pruning, tuned=self.tuned, progress=progress)

    def record(self) -> dict[str, Any]:
        """All of it as flat data for JSON, as records hold it."""
        code = methods.plugin_code(self.pruning.method)
        made = record((self.model, self.pruning, self.sampling, self.generation), RECORDED)
        return made | ({"plugins": code} if code else {})
