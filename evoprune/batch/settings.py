"""The options of a batch, as records hold them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evoprune import methods
from evoprune.session.options import PipelineOptions, record

if TYPE_CHECKING:
    from evoprune.video_qa import VideoQA

# Options that records hold also at their defaults, as the first version's did; the others where they differ from these.
RECORDED = (
    "model", "revision", "dtype", "quantize", "load_format", "budget", "method", "method_args", "seed", "fps", "frames",
    "max_frames", "max_visual_tokens", "decoder", "max_new_tokens", "temperature", "top_p", "system",
)  # fmt: skip


@dataclass(frozen=True)
class Settings(PipelineOptions):
    """The options of a batch. Each row has its own part of the video instead of `start_s` and `end_s`."""

    def load(self, progress: Callable[[int, int], None] | None = None) -> "VideoQA":
        """Loads the model; raises what `VideoQA.load` raises."""
        from evoprune.video_qa import load_qa

        return load_qa(self.model, self.pruning, progress=progress)

    def record(self) -> dict[str, Any]:
        """All of it as flat data for JSON, as records hold it."""
        code = methods.plugin_code(self.pruning.method)
        made = record((self.model, self.pruning, self.sampling, self.generation), RECORDED)
        return made | ({"plugins": code} if code else {})
