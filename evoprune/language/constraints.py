"""Constrain the tokens of an answer. guidance.py has a constraint for answers that follow a schema."""

from typing import Protocol

import torch

from evoprune.language.prompt import THOUGHTS, Tokenizer


class TokenConstraint(Protocol):
    """Constrains the tokens of a single answer. `mask` is called before choosing each token, and `advance` afterwards."""

    def mask(self, size: int) -> torch.Tensor | None:
        """Return a mask of the allowed token IDs, bool `[size]` on the CPU and never all False, or None to allow all tokens."""

    def advance(self, token: int) -> None:
        """Record the chosen token. Not called for end tokens."""

    @property
    def complete(self) -> bool:
        """Whether the answer is complete, so only an end token can follow."""


class AnswerConstraint:
    """Applies another `TokenConstraint` to the answer only, so that the model can think freely before answering.

    Args:
        constraint: The constraint for the answer.
        in_thoughts: Whether the prompt ends with the opening `<think>` tag.
        may_think: Whether the model may start thinking with its first token.
    """

    def __init__(self, constraint: TokenConstraint, tokenizer: Tokenizer, in_thoughts: bool, may_think: bool):
        self._constraint = constraint
        self._tokenizer = tokenizer
        self._begin, self._end = map(tokenizer.backend.token_to_id, THOUGHTS)
        self._thinks = in_thoughts
        self._may_begin = may_think
        self._ids: list[int] = []  # thinking and answer token IDs so far

    def mask(self, size: int) -> torch.Tensor | None:
        if self._thinks:
            return None
        mask = self._constraint.mask(size)
        if mask is not None and not self._ids and self._begin is not None:
            mask[self._begin] = self._may_begin  # this token never occurs in the answer text
        return mask

    def advance(self, token: int) -> None:
        first = not self._ids
        self._ids.append(token)
        if self._thinks:
            self._think(token)
        elif first and token == self._begin:
            self._thinks = True
        else:
            self._constraint.advance(token)

    def _think(self, token: int) -> None:
        """Record a thinking token, including the closing `</think>`.

        If `</think>` isn't a single token, the token that completes it may also contain the beginning of the answer.
        """
        if self._end is not None:
            self._thinks = token != self._end
            return
        # Check only as many tokens as there are characters in `</think>`, because each token has at least one byte
        latest = self._tokenizer.decode(self._ids[-len(THOUGHTS[1]) :])
        _, ended, answer = latest.partition(THOUGHTS[1])
        if ended:
            self._thinks = False
            for answer_token in self._tokenizer.encode(answer.lstrip()):
                self._constraint.advance(answer_token)

    @property
    def complete(self) -> bool:
        return not self._thinks and self._constraint.complete
