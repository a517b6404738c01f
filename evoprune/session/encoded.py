"""The result of encoding a single input."""

from dataclasses import dataclass, replace

import torch

from evoprune.video import Plan
from evoprune.vision import Encoded, EncodedRows


@dataclass(frozen=True)
class EncodedInput:
    """An encoded input with its stage times and warnings."""

    plan: Plan
    encoded: Encoded  # the tokens for the language model; empty until they are selected for a question
    unselected: EncodedRows | None  # the rows from which tokens are selected, if the method selects tokens per question
    seconds: dict[str, float]  # the time spent in each of the stages in `report.INPUT_STAGES`
    wall_seconds: float  # the wall-clock time from the start of planning to the end of encoding
    cache: str  # "hit" (loaded from disk), "miss" (encoded and then stored) or "off"
    warnings: tuple[str, ...]  # the names of warnings, as used in reports
    damaged: int  # the number of packets that could not be decoded

    @property
    def kept(self) -> int:
        """Number of this input's visual tokens that the language model will read."""
        return self.plan.encoder.keep if self.unselected else len(self.encoded.kept)

    def own(self) -> "EncodedInput":
        """Return a copy that has no selected tokens yet and measures its time separately.

        If the method does not read the question, the same object is returned.
        """
        if not self.unselected:
            return self
        rows = replace(self.unselected, timer=self.unselected.timer.copy())
        return replace(self, unselected=rows, encoded=rows.nothing_selected())

    def selected(self, question: torch.Tensor) -> "EncodedInput":
        """Return a copy of this input with the tokens that the method selects for a question.

        If the method does not read the question, the same object is returned.

        Args:
            question: The embeddings of the question's tokens, `[words, D]`.
        """
        return replace(self, encoded=self.unselected.select_tokens(question)) if self.unselected else self
