"""Generate an answer after its prompt has been prefilled.

The steps are in this order: `TokenStream` chooses a token and lets a decoder (decoding.py) read it, `stream_answer` turns the
tokens into pieces of text and separates the model's reasoning, and `StopStrings` (stops.py) ends the answer at the first stop
string.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice, repeat, takewhile
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.decoders import DecodeStream

from evoprune.backend import to_device
from evoprune.errors import not_a_number_error
from evoprune.language.decoding import Drafter, Picked, decoders_for
from evoprune.language.generate import PrefillState
from evoprune.language.lookup import Lookup
from evoprune.language.prompt import THOUGHTS, Tokenizer, opens_thoughts
from evoprune.language.sampling import TokenLogprobs, best_of, choose, token_logprobs
from evoprune.language.settings import GenerationOptions
from evoprune.util import generator_seed

if TYPE_CHECKING:
    from evoprune.language.choices import Choice
    from evoprune.language.constraints import TokenConstraint


class AnswerStream(Iterator[tuple[str, bool]]):
    """Iterator that generates an answer and yields tuples of a piece of text and whether it is part of the model's reasoning.

    Pieces are generated lazily and split as in `stream_answer`. The same `seed` always produces the same answer.

    Args:
        state: The model's state after reading the prompt, which can be used for only one answer.
        options: Generation options. If `options.choices` is set, the answer is one of these choices.
        eos_ids: IDs of the tokens that end the answer.
        constraint: Constrains the answer tokens, but not the thinking tokens. None allows all tokens.

    Attributes:
        stop_reason: The stop string that ended the answer, or None.

    Raises:
        ModelError: During iteration, if a logit is NaN or infinite. Exceptions raised by the constraint propagate unchanged.
    """

    def __init__(
        self,
        state: PrefillState,
        options: GenerationOptions,
        tokenizer: Tokenizer,
        eos_ids: Collection[int],
        seed: int = 0,
        constraint: "TokenConstraint | None" = None,
    ):
        self._tokenizer = tokenizer
        if constraint is not None:
            from evoprune.language.constraints import AnswerConstraint

            in_thoughts = begins_with_thoughts(tokenizer, state.prompt_ids)
            constraint = AnswerConstraint(constraint, tokenizer, in_thoughts, options.thinking)
        if options.choices is None:
            self._tokens = TokenStream(state, options, eos_ids, seed, constraint)
        else:
            from evoprune.language.choices import ChosenTokens

            self._tokens = ChosenTokens(state, options, tokenizer, eos_ids)
        self._pieces = stream_answer(tokenizer, self._tokens, state.prompt_ids)
        self._stops = None
        if options.stop:
            from evoprune.language.stops import StopStrings

            self._stops = StopStrings(options.stop)
            self._pieces = self._stops.cut(self._pieces)

    def __next__(self) -> tuple[str, bool]:
        return next(self._pieces)

    @property
    def ids(self) -> list[int]:
        """Thinking and answer token IDs generated so far."""
        return self._tokens.ids

    @property
    def finish_reason(self) -> str | None:
        """The reason why the answer ended ("stop" or "length"), or None if the answer is incomplete."""
        return self._tokens.finish_reason if self.stop_reason is None else "stop"

    @property
    def stop_reason(self) -> str | None:
        return None if self._stops is None else self._stops.found

    @property
    def choices(self) -> "list[Choice]":
        """All choices with their probabilities, or an empty list if the choices haven't been scored yet."""
        return self._tokens.choices

    def logprobs_since(self, number: int) -> list[dict[str, Any]]:
        """Return all tokens starting at index `number`, with their log probabilities and alternatives, in report format."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._tokenizer.backend.decode([token], skip_special_tokens=False)
            return {"id": token, "token": text, "logprob": logprob, "bytes": [*self._tokenizer.bytes_of(token)]}

        return [
            entry(token, known.chosen) | {"top_logprobs": [entry(*each) for each in known.top]}
            for token, known in zip(self._tokens.ids[number:], self._tokens.logprobs[number:], strict=True)
        ]


class TokenStream(Iterator[int]):
    """Iterator that lazily generates the token IDs of an answer.

    The same `seed` always produces the same answer.

    Args:
        state: The model's state after reading the prompt, which can be used for only one answer.
        eos_ids: IDs of the tokens that end the answer, which are not yielded.
        constraint: Constrains the answer tokens, and can be used for only one answer. None allows all tokens.

    Raises:
        ModelError: During iteration, if a logit is NaN or infinite. Exceptions raised by the constraint propagate unchanged.
    """

    def __init__(
        self,
        state: PrefillState,
        settings: GenerationOptions,
        eos_ids: Iterable[int],
        seed: int = 0,
        constraint: "TokenConstraint | None" = None,
    ):
        # "stop" if the model ended its turn or the constraint allows no more tokens, "length" if the limit was reached, or None if
        # the answer is incomplete.
        self.finish_reason: str | None = None
        self.ids: list[int] = []  # tokens yielded so far
        self.logprobs: list[TokenLogprobs] = []  # one entry per token in `ids`, if log probabilities were requested
        self._state = state
        self._settings = settings
        self._eos_ids = frozenset(eos_ids)
        self._constraint = constraint
        penalizes = settings.repetition_penalty not in (None, 1)
        self._seen: set[int] = set()  # prompt and answer tokens
        if penalizes and state.prompt_ids is not None:
            self._seen.update(state.prompt_ids.tolist())
        self._greedy = settings.temperature == 0 and not penalizes
        self._lookup: Lookup | None = None
        drafters: list[Drafter] = []
        if self._greedy and settings.logprobs is None and state.prompt_ids is not None and state.language.can_draft:
            language = state.language
            self._lookup = Lookup(state.prompt_ids, None if language.reads_drafts_exactly else language.dtype)
            drafters.append(self._lookup)
            if layer := language.mtp_layer():
                from evoprune.language.mtp_drafter import MtpDrafter

                drafters.append(MtpDrafter(state, layer))
        self._decoders = decoders_for(state, drafters)
        # Use a CPU generator, so that a seed produces the same random numbers on all devices.
        self._random = torch.Generator().manual_seed(generator_seed(seed))

    @torch.inference_mode()
    def __next__(self) -> int:
        left = self._settings.max_new_tokens - len(self.ids)
        if self.finish_reason is None and self._constraint is not None and self._constraint.complete:
            self.finish_reason = "stop"
        if self.finish_reason is None and not left:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            raise StopIteration
        if self.ids:  # the model doesn't read the latest token until another token is requested
            token, logprobs = self._advance(left)
        else:
            token, logprobs = self._pick(self._state.logits)
        if token in self._eos_ids:
            self.finish_reason = "stop"
            raise StopIteration
        self.ids.append(token)
        self._seen.add(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self._constraint is not None:
            self._constraint.advance(token)
        return token

    def _advance(self, left: int) -> Picked:
        """Read the latest token, and choose the next one."""
        for decoder in self._decoders:
            if (picked := decoder.next_token(self.ids, left, self._pick)) is not None:
                return picked
        raise AssertionError("the last decoder always picks a token")

    def _pick(self, logits: torch.Tensor, best: torch.Tensor | None = None, drafted: bool = False) -> Picked | None:
        """Choose the next token from its logits. See `decoding.Pick`.

        Args:
            logits: float32 `[vocabulary]`.
            best: The result of `best_of`, if already known.
            drafted: Whether the logits are from a pass over drafted tokens. In that case, the result is None if rounding errors
                could affect the choice.
        """
        token = self._choose(logits, best, drafted)
        if token is None:
            return None
        if self._settings.logprobs is None:
            return token, None
        return token, token_logprobs(logits, token, self._settings.logprobs)

    def _choose(self, logits: torch.Tensor, best: torch.Tensor | None, drafted: bool) -> int | None:
        raw = logits
        if self._constraint is not None:
            mask = self._constraint.mask(len(logits))  # runs while a GPU is still computing the logits
            if mask is not None:
                best = None
                # Subtract instead of overwriting, so that NaN and infinite logits are still detected.
                logits = logits.where(to_device(mask, logits.device), logits - torch.inf)
        if self._greedy:
            if best is None:
                best = best_of(logits)
            token, finite = best.tolist()
            self._check(finite)
            return None if drafted and self._lookup.is_near_tie(raw, logits) else token
        logits = logits.cpu()
        self._check(logits.max().isfinite())  # the maximum is NaN if any logit is
        return choose(logits, self._settings, self._random, self._seen)

    def _check(self, finite: bool | torch.Tensor) -> None:
        if not finite:
            raise not_a_number_error("generate" if self.ids else "prefill")


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Decode token IDs as they arrive, and yield the text in pieces.

    Concatenating the pieces gives the same result as decoding all IDs at once. A byte-level token may end in the middle of a
    character, but a piece never does.
    """
    stream = DecodeStream(skip_special_tokens=True)
    pending = []
    for token in ids:
        pending.append(token)
        if piece := stream.step(tokenizer.backend, token):
            yield piece
            pending = []
    if rest := tokenizer.decode(pending):  # an incomplete final character, which `DecodeStream` never returns
        yield rest


def begins_with_thoughts(tokenizer: Tokenizer, prompt_ids: torch.Tensor) -> bool:
    """Return True if a prompt, int64 `[L]`, ends with the opening `<think>` tag."""
    return opens_thoughts(tokenizer.backend.decode(prompt_ids[-16:].tolist(), skip_special_tokens=False))


def stream_answer(tokenizer: Tokenizer, ids: Iterable[int], prompt_ids: torch.Tensor) -> Iterator[tuple[str, bool]]:
    """Decode token IDs and yield tuples of a piece of text (see `stream_text`) and whether it is part of the model's reasoning.

    The opening `<think>` tag is either at the end of the prompt (`prompt_ids`, int64 `[L]`) or the first generated token. In both
    cases, the first tuple contains empty text. Reasoning ends at `</think>`. If the tokenizer has a special token for `</think>`,
    only that token is recognized; otherwise, the decoded text is searched for `</think>`. The `</think>` tag and any whitespace
    after it are not yielded.
    """
    ids = iter(ids)
    begin, end = map(tokenizer.backend.token_to_id, THOUGHTS)
    if not begins_with_thoughts(tokenizer, prompt_ids):
        first = list(islice(ids, 1))
        if begin is None or first != [begin]:
            yield from ((piece, False) for piece in stream_text(tokenizer, chain(first, ids)))
            return
    yield "", True
    if end is not None:
        thoughts = stream_text(tokenizer, takewhile(lambda token: token != end, ids))
        pieces = chain(zip(thoughts, repeat(True)), zip(stream_text(tokenizer, ids), repeat(False)))
    else:
        pieces = _split(stream_text(tokenizer, ids), THOUGHTS[1])
    started = set()
    for piece, thought in pieces:
        if thought not in started:
            piece = piece.lstrip()
        if piece:
            started.add(thought)
            yield piece, thought


def _split(pieces: Iterator[str], end: str) -> Iterator[tuple[str, bool]]:
    """Remove the first occurrence of `end` from a text stream, and yield each piece and whether it precedes `end`."""
    held_back = ""  # text that may be a prefix of `end`
    for piece in pieces:
        before, separator, after = (held_back + piece).partition(end)
        if separator:
            yield before, True
            yield after, False
            yield from zip(pieces, repeat(False))
            return
        start = next(
            i for i in range(max(0, len(before) - len(end) + 1), len(before) + 1) if end.startswith(before[i:])
        )
        held_back = before[start:]
        yield before[:start], True
    yield held_back, True
