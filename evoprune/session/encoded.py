"""The result of encoding one input."""

from dataclasses import dataclass, replace

import torch

from evoprune.video import Plan
from evoprune.vision import Encoded, EncodedRows


@dataclass(frozen=True)
class EncodedInput:
    """An encoded input, with its timings and warnings."""

    plan: Plan
    encoded: Encoded  # tokens for the language model; empty until a question selects them
    unselected: EncodedRows | None  # rows to select from, if the method selects tokens per question
    seconds: dict[str, float]  # time spent in each stage, by the names in `report.INPUT_STAGES`
    wall_seconds: float  # wall-clock time from the start of planning to the end of encoding
    cache: str  # "hit" (from disk), "miss" (encoded, then stored) or "off"
    warnings: tuple[str, ...]  # names of warnings, as in reports
    damaged: int  # number of packets that could not be decoded

    @property
    def kept(self) -> int:
        """Number of visual tokens of this input that the language model will read."""
        return self.plan.encoder.keep if self.unselected else len(self.encoded.kept)

    def own(self) -> "EncodedInput":
        """Return a copy with nothing selected and with a separate timer.

        If the method does not read the question, return the same object.
        """
        if not self.unselected:
            return self
        rows = replace(self.unselected, timer=self.unselected.timer.copy())
        return replace(self, unselected=rows, encoded=rows.nothing_selected())

    def selected(self, question: torch.Tensor) -> "EncodedInput":
        """Return a copy of this input with the tokens selected for a question.

        If the method does not read the question, return the same object.

        Args:
            question: Embedded question, `[words, D]`.
        """
        return replace(self, encoded=self.unselected.select_tokens(question)) if self.unselected else self
