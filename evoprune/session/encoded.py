"""An encoded video or image, ready for questions."""

from dataclasses import dataclass, replace

import torch

from evoprune.video import Plan
from evoprune.vision import Encoded, EncodedRows


@dataclass(frozen=True)
class EncodedInput:
    """An encoded video or image, together with its stage times and warnings."""

    plan: Plan
    encoded: Encoded  # tokens for the language model; empty until selected, if `unselected` is set
    unselected: EncodedRows | None  # rows to select tokens from, if the method needs the question
    seconds: dict[str, float]  # time spent in each of the stages in `report.INPUT_STAGES`
    wall_seconds: float  # wall-clock time from the start of planning to the end of encoding
    cache: str  # "hit" (loaded from disk), "miss" (encoded and then stored) or "off"
    warnings: tuple[str, ...]  # names of warnings, as they appear in reports
    damaged: int  # number of packets that could not be decoded

    @property
    def kept(self) -> int:
        """Number of this input's visual tokens that the language model will read."""
        return self.plan.encoder.keep if self.unselected else len(self.encoded.kept)

    def own(self) -> "EncodedInput":
        """Return a copy whose tokens can be selected independently, with a timer of its own.

        If the pruning method does not read the question, the tokens never change, so this object itself is returned.
        """
        if not self.unselected:
            return self
        rows = replace(self.unselected, timer=self.unselected.timer.copy())
        return replace(self, unselected=rows, encoded=rows.nothing_selected())

    def selected(self, question: torch.Tensor) -> "EncodedInput":
        """Return a copy of this input with the tokens that the pruning method selects for a question.

        If the method does not read the question, this object itself is returned.

        Args:
            question: The embeddings of the question's tokens, `[words, D]`.
        """
        return replace(self, encoded=self.unselected.select_tokens(question)) if self.unselected else self
