"""Prompt lookup decoding: draft the next tokens of an answer from text that the model has already read or written.

If the last tokens of an answer also occur earlier, in the question, the subtitles, an earlier turn or the answer itself, the tokens
that followed them there are a likely continuation. The model reads the whole draft in one pass, which on a CPU takes about as long
as a pass over a single token, because reading the weights from memory takes most of the time. It then keeps the tokens that it
would have chosen anyway. Source: Inference with Reference (arXiv 2304.04487, section 3).
"""

from collections.abc import Sequence

import torch

NGRAM = 3  # number of tokens that must occur earlier in the same order
DRAFT = 3  # maximum number of tokens in a draft; kernels for a few rows take at most 1.6 times as long for 4 rows as for one
REST = 16  # number of tokens after a useless draft for which nothing is drafted
MIN_TIE, TIE_STEPS = 0.005, 8  # see `Lookup.is_near_tie`


class Lookup:
    """Drafts the continuation of one answer.

    Args:
        prompt: int64 `[L]` on the CPU, the token ids of the whole prompt.
        dtype: The dtype in which the language model computes.
    """

    def __init__(self, prompt: torch.Tensor, dtype: torch.dtype):
        self._tie = max(MIN_TIE, TIE_STEPS * torch.finfo(dtype).eps)
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # index of the token after the latest occurrence of an n-gram
        self._answer_length = 0
        self._resting = 0  # length of the answer at which drafting starts again
        self._extend(prompt.tolist())

    def draft(self, answer: Sequence[int], most: int) -> list[int]:
        """Return up to `most` tokens that may follow the tokens of the answer so far, or an empty list."""
        if len(answer) == self._answer_length:  # called again after an exception
            return []
        *new, latest = answer[self._answer_length :]
        self._extend(new)
        # Looked up before the latest n-gram itself is added
        place = self._places.get((*self._tokens[1 - NGRAM :], latest))
        self._extend([latest])
        self._answer_length = len(answer)
        if place is None or len(answer) < self._resting:
            return []
        return self._tokens[place : place + min(most, DRAFT)]

    def reject(self, accepted: int) -> None:
        """Record that a draft ended after `accepted` tokens. If it was useless, nothing is drafted for a while."""
        if not accepted:
            self._resting = self._answer_length + REST

    def is_near_tie(self, logits: torch.Tensor, allowed: torch.Tensor) -> bool:
        """Return True if rounding could decide which of the two most probable tokens has the larger logit.

        A pass over several tokens adds numbers up in a different order from a pass over one token, so their logits differ by a
        small share of the logits' standard deviation.

        Args:
            logits: float32 `[vocabulary]`.
            allowed: The same logits, where those of forbidden tokens are -inf.
        """
        first, second = allowed.topk(2).values
        return bool(first - second < self._tie * logits.std())

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._tokens.append(token)
            end = len(self._tokens)
            if end >= NGRAM:
                self._places[tuple(self._tokens[end - NGRAM :])] = end
