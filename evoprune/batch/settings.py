"""The options of a batch, as records hold them."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from evoprune.pipeline.options import PipelineOptions

if TYPE_CHECKING:
    from evoprune.pipeline.video_qa import VideoQA

# What an answer does not depend on, or what each row says itself.
NOT_RECORDED = ("device", "offline", "threads", "start_s", "end_s")


class Settings(PipelineOptions):
    """The options of a batch. Each row has its own part of the video instead of `start_s` and `end_s`."""

    def load(self, progress: Callable[[int, int], None] | None = None) -> "VideoQA":
        """Loads the model; raises what `VideoQA.load` raises."""
        from evoprune.pipeline.video_qa import VideoQA

        return VideoQA.load(**vars(self.model), **vars(self.pruning), progress=progress)

    def record(self) -> dict[str, Any]:
        """All of it as flat data for JSON, as records hold it."""
        both = asdict(self.model) | asdict(self.pruning) | asdict(self.sampling) | asdict(self.generation)
        return {name: value for name, value in both.items() if name not in NOT_RECORDED}
