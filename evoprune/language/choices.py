"""Choose an answer from a fixed list by scoring each choice and picking the most probable one."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from math import isfinite

import torch

from evoprune.backend import to_device
from evoprune.errors import not_a_number_error
from evoprune.language.generate import PrefillState
from evoprune.language.prompt import Tokenizer
from evoprune.language.sampling import TokenLogprobs
from evoprune.language.settings import GenerationOptions


@dataclass(frozen=True)
class Choice:
    """An allowed answer and its probability.

    Attributes:
        text: The answer.
        logprob: Natural log probability of the answer tokens and of the end of the answer, computed from the raw logits.
        tokens: Number of tokens included in `logprob`, including the token that ends the answer, if the model has one.
        probability: Probability relative to the other choices. The probabilities of all choices add up to 1.
    """

    text: str
    logprob: float
    tokens: int
    probability: float


class ChosenTokens(Iterator[int]):
    """Iterator over the token IDs of the most probable choice. In case of a tie, the first choice wins.

    All choices are scored when the first token is requested. This class has the same attributes as `TokenStream`, so it can be used
    as a replacement.

    Attributes:
        choices: The choices with their probabilities, or an empty list if the choices haven't been scored yet.

    Raises:
        ModelError: During iteration, if a logit is NaN or infinite.
    """

    def __init__(
        self,
        state: PrefillState,
        options: GenerationOptions,
        tokenizer: Tokenizer,
        eos_ids: Collection[int],
    ):
        self.choices: list[Choice] = []
        self.finish_reason: str | None = None
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self._tokens = options.choice_ids(tokenizer)
        self._score = partial(score_choices, state, options, self._tokens, eos_ids)
        self._remaining: list[int] = []

    def __next__(self) -> int:
        if not self.choices:
            self.choices = self._score()
            best = max(range(len(self.choices)), key=lambda place: self.choices[place].probability)
            self._remaining = list(self._tokens[best])
        if not self._remaining:
            self.finish_reason = "stop"
            raise StopIteration
        self.ids.append(self._remaining.pop(0))
        return self.ids[-1]


@torch.inference_mode()
def score_choices(
    state: PrefillState,
    options: GenerationOptions,
    ids: Sequence[Sequence[int]],
    eos_ids: Collection[int],
) -> list[Choice]:
    """Compute the probability of each choice in `options` without modifying `state`.

    A token prefix shared by all choices is read only once. Each choice's score includes the end of the answer. Otherwise, the score
    of "red" would include the probability of "red car".

    Args:
        state: The state after reading the prompt.
        options: The generation options, including the choices.
        ids: One list of token IDs per choice, without an end token.
        eos_ids: IDs of the tokens that may end the answer. Each counts once, even if it is repeated.

    Raises:
        ModelError: If a logit is NaN or infinite.
    """
    shared = [same[0] for same in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ids, strict=False))]
    ends = list(set(eos_ids))
    logprobs = []
    with _branch(state) as after_shared:
        shared_logprob = _read_tokens(after_shared, shared)
        for own in ids:
            with _branch(after_shared) as branch:
                logprob = shared_logprob + _read_tokens(branch, own[len(shared) :])
                if ends:
                    logprob += float(branch.logits.log_softmax(0)[ends].logsumexp(0))
            if not isfinite(logprob):
                raise not_a_number_error("generate")
            logprobs.append(logprob)
    counts = [len(own) + bool(ends) for own in ids]
    scores = logprobs
    if options.choice_score == "mean":
        scores = [logprob / count for logprob, count in zip(logprobs, counts, strict=True)]
    probabilities = torch.tensor(scores, dtype=torch.float64, device="cpu").softmax(0).tolist()
    return list(map(Choice, options.choices, logprobs, counts, probabilities))


@contextmanager
def _branch(state: PrefillState) -> Iterator[PrefillState]:
    """Return a context manager that provides a copy of `state`, which can read more tokens without modifying the original."""
    if state.language.can_crop:
        length = state.cache.length
        try:
            yield replace(state)
        finally:
            state.cache.crop(length)
    else:
        yield replace(state, cache=state.cache.copy())


def _read_tokens(state: PrefillState, ids: Sequence[int]) -> float:
    """Read tokens and return the sum of their log probabilities given the preceding tokens, or 0 if there are no tokens."""
    if not ids:
        return 0.0
    given = torch.tensor(ids, dtype=torch.int64, device="cpu")
    logits = torch.cat([state.logits[None], state.read(given)[:-1]])
    return float(logits.log_softmax(1).gather(1, to_device(given, logits.device)[:, None]).sum())
