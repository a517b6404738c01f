"""An input that was encoded."""

from dataclasses import dataclass, replace

import torch

from evoprune.video import Plan
from evoprune.vision import Encoded, EncodedRows, select_tokens


@dataclass(frozen=True)
class EncodedInput:
    """An input that was encoded, and what that took."""

    plan: Plan
    encoded: Encoded  # what the language model reads; none where a question is to come first
    unselected: EncodedRows | None  # where the method selects tokens for each question, what it selects from
    seconds: dict[str, float]  # how long each stage was busy, and "overlap": all of `report.OF_INPUTS`
    wall_seconds: float  # from the start of planning to the end of encoding
    cache: str  # "hit" (from disk), "miss" (encoded, then stored) or "off"
    warnings: tuple[str, ...]  # names, as in reports
    damaged: int  # packets that could not be decoded

    @property
    def kept(self) -> int:
        """How many tokens the language model will read."""
        return self.plan.encoder.keep if self.unselected else len(self.encoded.kept)

    def own(self) -> "EncodedInput":
        """Return the same one for another conversation, whose selections it times apart."""
        if not self.unselected:
            return self
        rows = replace(self.unselected, timer=self.unselected.timer.copy())
        return replace(self, unselected=rows, encoded=rows.nothing_selected())

    def selected(self, question: torch.Tensor) -> "EncodedInput":
        """Return it with the tokens for a question, its embedding `[words, D]`, where the method selects them for each one."""
        return replace(self, encoded=select_tokens(self.unselected, question)) if self.unselected else self
