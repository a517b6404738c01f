"""Answers that are one of some texts: how probable each of them is."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from math import isfinite

import torch

from evoprune.backend import to_device
from evoprune.errors import UsageError
from evoprune.language.generate import PrefillState, TokenLogprobs, can_crop
from evoprune.language.prompt import Tokenizer
from evoprune.language.settings import GenerationOptions
from evoprune.model import not_a_number_error
from evoprune.util import shown


@dataclass(frozen=True)
class Choice:
    """Hold a text that an answer may be, and how probable it is.

    `logprob`: the natural logarithm of the probability of its tokens and of the end of the answer, by the model's logits alone.
    `tokens`: how many these are. `probability`: among the choices; those of all add up to 1.
    """

    text: str
    logprob: float
    tokens: int
    probability: float


def tokens_of(tokenizer: Tokenizer, options: GenerationOptions) -> list[list[int]]:
    """Return the tokens of each of `options.choices`, without the end of the answer.

    Raises UsageError: one has more tokens than an answer may have, or two have the same.
    """
    every: list[list[int]] = []
    for text in options.choices:
        ids = tokenizer.encode(text)
        if len(ids) > options.max_new_tokens:
            said = (
                f"the choice {shown(text)!r} has {len(ids):,} tokens, and an answer at most {options.max_new_tokens:,}"
            )
            raise UsageError(said, "allow more (-n, max_new_tokens), or give a shorter one")
        if ids in every:
            raise UsageError(f"the choice {shown(text)!r} is to the model the same as another", "leave one out")
        every.append(ids)
    return every


class ChosenTokens(Iterator[int]):
    """Token ids of the most probable choice, of several the first; all are scored when the first token is requested.

    In the place of a `TokenStream`, with its attributes. `choices`: as soon as they are scored.

    Raises ModelError: while iterating, if a logit is NaN or infinite.
    """

    def __init__(
        self,
        state: PrefillState,
        options: GenerationOptions,
        tokenizer: Tokenizer,
        eos_ids: Collection[int],
        one_by_one: bool = False,
    ):
        self.choices: list[Choice] = []
        self.finish_reason: str | None = None
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self._tokens = tokens_of(tokenizer, options)
        self._score = partial(scored, state, options, self._tokens, eos_ids, one_by_one)
        self._left: list[int] = []

    def __next__(self) -> int:
        if not self.choices:
            self.choices = self._score()
            best = max(range(len(self.choices)), key=lambda place: self.choices[place].probability)
            self._left = list(self._tokens[best])
        if not self._left:
            self.finish_reason = "stop"
            raise StopIteration
        self.ids.append(self._left.pop(0))
        return self.ids[-1]


@torch.inference_mode()
def scored(
    state: PrefillState,
    options: GenerationOptions,
    ids: Sequence[Sequence[int]],
    eos_ids: Collection[int],
    one_by_one: bool = False,
) -> list[Choice]:
    """Return the choices of `options`, whose tokens are `ids`, with their probabilities. Afterwards `state` is as it was.

    The tokens with which all of them begin are read once. Each ends with one of `eos_ids`: so "red" does not have the probability
    of "red car" too. `one_by_one`: a pass for each token, as decoding has it; else one for several.

    Raises ModelError: a logit is NaN or infinite.
    """
    shared = [same[0] for same in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ids, strict=False))]
    ends = list(eos_ids)
    logprobs = []
    with _lent(state) as begun:
        common = _read(begun, shared, one_by_one)
        for own in ids:
            with _lent(begun) as complete:
                logprob = common + _read(complete, own[len(shared) :], one_by_one)
                logprob += float(complete.logits.log_softmax(0)[ends].logsumexp(0))
            if not isfinite(logprob):
                raise not_a_number_error("generate")
            logprobs.append(logprob)
    counts = [len(own) + 1 for own in ids]
    scores = logprobs
    if options.choice_score == "mean":
        scores = [logprob / count for logprob, count in zip(logprobs, counts, strict=True)]
    probabilities = torch.tensor(scores, dtype=torch.float64, device="cpu").softmax(0).tolist()
    return list(map(Choice, options.choices, logprobs, counts, probabilities))


@contextmanager
def _lent(state: PrefillState) -> Iterator[PrefillState]:
    """Lend a state that goes on from this one, which is as it was afterwards."""
    if can_crop(state.model):
        length = state.cache.length
        try:
            yield replace(state, answer=list(state.answer))
        finally:
            state.cache.crop(length)
    else:
        yield replace(state, cache=state.cache.copy(), answer=list(state.answer))


def _read(state: PrefillState, ids: Sequence[int], one_by_one: bool) -> float:
    """Reads tokens, perhaps none. Returns the log probability of all of them, each behind those before it."""
    given = torch.tensor(ids, dtype=torch.int64, device="cpu")
    total = 0.0
    if not ids:
        return total
    for piece in given.split(1 if one_by_one else len(ids)):
        before = state.logits[None]
        logits = torch.cat([before, state.read(piece)[:-1]])
        places = to_device(piece, logits.device)[:, None]
        total += float(logits.log_softmax(1).gather(1, places).sum())
    return total
