"""Nuwa's stage inside the language model (arXiv 2602.02951): after 15 of 28 layers, the tokens that some head attends to most stay.

As in the authors' code for Qwen2.5-VL: a head's attention is the mean over the last three tokens of the prompt, and the score is
the greatest of any head. Their code lets more tokens reach the language model, so that the mean over the stages is the budget: 35%
and then 42% of them for a quarter. Here `-b` is what reaches the language model.
Adapted: layers in relative depth (the code's layer 14 is the fifteenth of 28). Attention is rounded, so equal tokens are ties.
"""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.fastv import FastV
from evoprune.pruning.layer_tokens import LayerTokens
from evoprune.pruning.ranking import highest, relative
from evoprune.pruning.types import Selection

LAST = 3  # tokens of the prompt whose attention counts


@dataclass(frozen=True)
class NuwaInner(FastV):
    """Field: depth: as in `FastV`."""

    name: ClassVar[str] = "nuwa-inner"
    source: ClassVar[str] = "arXiv 2602.02951"
    default_share: ClassVar[float] = 0.42

    depth: float = 15 / 28

    def select(self, tokens: LayerTokens) -> Selection:
        score = tokens.last_weights(LAST)[:, tokens.visual].amax(0)
        return Selection(highest(relative(score), tokens.left))
