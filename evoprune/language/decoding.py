"""Advance an answer by one token: with a CUDA graph, with drafted tokens, or with one pass over the latest token.

All decoders have the same method. A decoder that cannot generate the next token returns None, and the next decoder is asked.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from evoprune.backend import Device, Quantization
from evoprune.errors import callback_errors
from evoprune.language.generate import PrefillState
from evoprune.language.sampling import TokenLogprobs

if TYPE_CHECKING:
    from evoprune.language.static import StaticCache

Picked = tuple[int, TokenLogprobs | None]  # a token, and its log probabilities if they were requested
# Picks a token from its logits. It also receives the result of `best_of` for these logits, if already known. With `drafted=True`,
# it returns None if rounding errors could affect the choice.
Pick = Callable[..., Picked | None]


class Decoder(Protocol):
    """Generates the tokens of one answer after the first token."""

    def next_token(self, ids: Sequence[int], left: int, pick: Pick) -> Picked | None:
        """Read the answer tokens that haven't been read yet, and pick the next token.

        After an exception, this method can be called again with the same arguments.

        Args:
            ids: The answer tokens so far (at least one).
            left: Maximum number of tokens that can still be added to the answer.

        Returns:
            The result of `pick` for the next token, or None if another decoder has to generate it.
        """


class Drafter(Protocol):
    """Guesses the next tokens of one answer. The guesses affect only the speed, because they are verified."""

    def draft(self, answer: Sequence[int], most: int) -> list[int]:
        """Draft up to `most` tokens that are likely to follow the answer so far, or none."""

    def verified(self, accepted: int) -> None:
        """Record how many tokens of the latest draft were accepted."""


def decoders_for(state: PrefillState, drafters: Sequence[Drafter]) -> list[Decoder]:
    """Return the decoders for an answer, in the order in which they are asked. The last decoder never returns None.

    Args:
        drafters: Draft tokens, in the order in which they are asked. Without drafters, the model reads one token at a time.
    """
    decoders: list[Decoder] = []
    if Device(state.logits.device).capture is not None:
        decoders.append(GraphDecoder(state))
    if drafters:
        decoders.append(DraftingDecoder(state, drafters))
    return [*decoders, PlainDecoder(state)]


class PlainDecoder:
    """Reads the latest token in a separate pass."""

    def __init__(self, state: PrefillState):
        self._state = state

    def next_token(self, ids: Sequence[int], left: int, pick: Pick) -> Picked:
        state = self._state
        if missing := ids[state.answer_columns :]:
            state.read(torch.tensor(missing, dtype=torch.int64, device="cpu"))
        return pick(state.logits)


class DraftingDecoder:
    """Reads drafted tokens in the same pass as the latest token. The cache must be able to crop the columns of the latest pass."""

    def __init__(self, state: PrefillState, drafters: Sequence[Drafter]):
        self._state = state
        self._drafters = drafters
        self._drafter = drafters[0]  # made the latest draft
        # float32 `[n, vocabulary]`, logits after the last n tokens in the KV cache, or None if none of them was drafted
        self._drafted: torch.Tensor | None = None

    def next_token(self, ids: Sequence[int], left: int, pick: Pick) -> Picked | None:
        state = self._state
        last = len(ids) - 1
        if not self._drafted_latest(ids) and not self._read_draft(ids, left):
            return None
        picked = pick(self._drafted[last - state.answer_columns], drafted=True)
        if picked is None:
            self._crop(last)
        return picked

    def _drafted_latest(self, ids: Sequence[int]) -> bool:
        """Return True if the latest token was drafted, so that its logits are known."""
        cache = self._state.cache
        return self._drafted is not None and cache.ids_from(self._state.columns + len(ids) - 1)[:1] == ids[-1:]

    def _read_draft(self, ids: Sequence[int], left: int) -> bool:
        """Replace the latest draft by a new draft and read it. Return False if there is no new draft."""
        state = self._state
        last = len(ids) - 1
        if self._drafted is not None:
            self._drafter.verified(len(self._drafted) - 1 - (state.answer_columns - last))
        self._crop(min(last, state.answer_columns))
        draft: list[int] = []
        for drafter in self._drafters:
            if draft := drafter.draft(ids, left - 1):
                self._drafter = drafter
                break
        missing = ids[state.answer_columns :]
        if not draft or len(missing) + len(draft) > Quantization.few_rows:
            return False
        logits = state.read(torch.tensor([*missing, *draft], dtype=torch.int64, device="cpu"))
        self._drafted = logits[len(missing) - 1 :]
        return True

    def _crop(self, tokens: int) -> None:
        """Crop the KV cache to the prompt and the first answer tokens."""
        self._drafted = None
        self._state.crop(tokens)


class GraphDecoder:
    """Runs each forward pass as a CUDA graph if possible (see language/static.py)."""

    def __init__(self, state: PrefillState):
        self._state = state
        self._holder = object()  # identifies this answer to the static cache; it must not reference the model
        self._steps: StaticCache | None = (
            None  # contains all answer tokens except the latest, or None if no graph is in use
        )

    def next_token(self, ids: Sequence[int], left: int, pick: Pick) -> Picked | None:
        from evoprune.language import static

        state = self._state
        model = state.language.model
        last = len(ids) - 1
        picked = None
        with callback_errors() as passing:
            try:
                if self._steps is None and state.answer_columns == last:
                    position = state.next_position + last
                    self._steps = static.begin(model, self._holder, state.cache, position, len(ids), left)
                if self._steps is not None:
                    picked = self._steps.following(model, self._holder, ids[-1], passing(pick))
            except Exception as problem:  # graph capture and the captured modules can raise anything
                static.give_up(model, problem)
        if picked is None:
            self._steps = None
        return picked
