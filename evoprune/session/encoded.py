"""An encoded video or image, ready to be asked about."""

import threading
from dataclasses import dataclass, field, replace

import torch

from evoprune.report import EncodingTimes
from evoprune.video import Plan
from evoprune.vision import Encoded, EncodedRows


@dataclass(frozen=True)
class EncodedInput:
    """An encoded video or image, together with its stage times and warnings."""

    plan: Plan
    encoded: Encoded  # tokens for the language model; empty until selected, if `unselected` is set
    unselected: EncodedRows | None  # rows to select tokens from, if the method reads the question
    seconds: dict[str, float]  # time spent in each stage in `report.INPUT_STAGES`
    wall_seconds: float  # wall-clock time from the start of planning to the end of encoding
    cache: str  # "hit" (loaded from disk), "miss" (encoded and then stored), or "off"
    warnings: tuple[str, ...]  # warning names, as they appear in reports
    damaged: int  # number of packets that could not be decoded
    # Held by the first answer whose report includes these times. Copies share it, so no two answers report the same times.
    reported: threading.Lock = field(default_factory=threading.Lock)

    @property
    def times(self) -> EncodingTimes:
        return EncodingTimes(self.seconds, self.wall_seconds, self.encoded.prune_seconds)

    @property
    def kept(self) -> int:
        """Number of visual tokens of this input that the language model will read."""
        return self.plan.encoder.keep if self.unselected else len(self.encoded.kept)

    def own(self) -> "EncodedInput":
        """Return a copy with its own timer, whose tokens can be selected independently.

        If the pruning method doesn't read the question, the tokens never change, so this returns the object itself.
        """
        if not self.unselected:
            return self
        rows = replace(self.unselected, timer=self.unselected.timer.copy())
        return replace(self, unselected=rows, encoded=rows.nothing_selected())

    def selected(self, question: torch.Tensor) -> "EncodedInput":
        """Return a copy of this input with the tokens selected for a question.

        If the pruning method doesn't read the question, this returns the object itself.

        Args:
            question: The embeddings of the question tokens, `[words, D]`.
        """
        return replace(self, encoded=self.unselected.select_tokens(question)) if self.unselected else self
