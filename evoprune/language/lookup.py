"""Prompt lookup decoding: draft the next answer tokens from text that the model has already read or generated.

If the last few answer tokens also occur earlier (in the question, the subtitles, an earlier turn, or the answer itself), the tokens
following the earlier occurrence are a likely continuation. The model reads this draft in a single pass, and keeps the tokens it
would have chosen anyway. On a CPU, this takes 1.0 to 2.0 times as long as a pass over a single token, because much of the time is
spent reading the weights from memory. Based on Inference with Reference (arXiv 2304.04487, section 3).
"""

from collections.abc import Sequence

import torch

NGRAM = 3  # number of consecutive tokens that must match
DRAFT = 3  # maximum draft length in tokens; a pass over 4 rows takes at most 2.0 times as long as a pass over 1 row
REST = 16  # number of tokens to pause drafting for after a useless draft
MIN_TIE, TIE_STEPS = 0.005, 8  # see `Lookup.is_near_tie`


class Lookup:
    """Drafts the next tokens of a single answer. A `Drafter` (see decoding.py).

    Args:
        prompt: Token IDs of the unpruned prompt, int64 `[L]` on the CPU.
        dtype: The dtype used for computation in the language model. None means that the logits don't depend on how many tokens are
            read in a pass.
    """

    def __init__(self, prompt: torch.Tensor, dtype: torch.dtype | None):
        self._tie = 0.0 if dtype is None else max(MIN_TIE, TIE_STEPS * torch.finfo(dtype).eps)
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # maps n-grams to the index after their latest occurrence
        self._answer_length = 0
        self._resting = 0  # answer length at which drafting resumes
        self._extend(prompt.tolist())

    def draft(self, answer: Sequence[int], most: int) -> list[int]:
        """Draft up to `most` next tokens. Return an empty list if there is no match."""
        if len(answer) == self._answer_length:  # called again after an exception
            return []
        *new, latest = answer[self._answer_length :]
        self._extend(new)
        # Look up the latest n-gram before adding it, so that it doesn't match itself
        place = self._places.get((*self._tokens[1 - NGRAM :], latest))
        self._extend([latest])
        self._answer_length = len(answer)
        if place is None or len(answer) < self._resting:
            return []
        return self._tokens[place : place + min(most, DRAFT)]

    def verified(self, accepted: int) -> None:
        """Record the result of a draft. If no token was accepted, drafting pauses for a while."""
        if not accepted:
            self._resting = self._answer_length + REST

    def is_near_tie(self, logits: torch.Tensor, allowed: torch.Tensor) -> bool:
        """Return True if rounding errors could determine which of the two most probable tokens has the larger logit.

        A pass over multiple tokens adds numbers in a different order than a pass over a single token, so the logits differ by a
        small fraction of their standard deviation.

        Args:
            logits: float32 `[vocabulary]`.
            allowed: The same logits, with -inf for forbidden tokens.
        """
        if not self._tie:
            return False
        first, second = allowed.topk(2).values
        return bool(first - second < self._tie * logits.std())

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._tokens.append(token)
            end = len(self._tokens)
            if end >= NGRAM:
                self._places[tuple(self._tokens[end - NGRAM :])] = end
