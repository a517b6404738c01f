"""Draft the next answer token with the model's layer for multi-token prediction (see mtp.py)."""

from collections.abc import Sequence

import torch

from evoprune.backend import Quantization
from evoprune.language.generate import PrefillState
from evoprune.language.mtp import MtpLayer
from evoprune.methods import arange_on

TRIAL = 16  # number of drafts after which drafting may stop
# Smallest share of drafts to be accepted. A rejected draft costs the layer's own pass and a second row in the model's pass.
LEAST = 0.5


class MtpDrafter:
    """Drafts the next token of a single answer. A `Drafter` (see decoding.py).

    The layer, whose cache must be empty, reads only the last column of the prompt and the columns of the answer. Of those, it reads
    only the columns of the latest pass, so it skips columns that were read after other drafts. This affects its drafts, but not the
    answer. Drafting stops if too few drafts are accepted.
    """

    def __init__(self, state: PrefillState, layer: MtpLayer):
        self._state = state
        self._layer = layer
        self._answer_length = 0  # number of answer tokens at the latest draft
        self._drafted = 0
        self._accepted = 0

    @property
    def stops(self) -> bool:
        """Whether too few drafts were accepted to go on."""
        return self._drafted >= TRIAL and self._accepted < LEAST * self._drafted

    def draft(self, answer: Sequence[int], most: int) -> list[int]:
        state = self._state
        end = state.answer_columns
        columns = len(state.hidden)
        if self.stops or not most or not columns or end != len(answer) - 1 or len(answer) == self._answer_length:
            return []
        self._answer_length = len(answer)
        first = end - columns
        following = torch.tensor(answer[first + 1 :], dtype=torch.int64, device="cpu")
        positions = (arange_on(columns, "cpu") + state.next_position + first).expand(3, -1)
        with Quantization.decoding():
            logits = self._layer.logits(state.hidden, following, positions)
        return [int(logits.argmax())]

    def verified(self, accepted: int) -> None:
        self._drafted += 1
        self._accepted += accepted
