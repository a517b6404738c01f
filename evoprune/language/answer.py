"""Stream an answer in pieces, separate it from the model's reasoning, and end it at the first stop string."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice, repeat, takewhile
from typing import Any

import torch
from tokenizers.decoders import DecodeStream

from evoprune.language.choices import Choice, ChosenTokens
from evoprune.language.generate import PrefillState, TokenConstraint, TokenStream
from evoprune.language.prompt import THOUGHTS, Tokenizer, opens_thoughts
from evoprune.language.settings import GenerationOptions


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
        constraint: TokenConstraint | None = None,
    ):
        self._tokenizer = tokenizer
        if constraint is not None:
            in_thoughts = begins_with_thoughts(tokenizer, state.prompt_ids)
            constraint = AnswerConstraint(constraint, tokenizer, in_thoughts, options.thinking)
        if options.choices is None:
            self._tokens = TokenStream(state, options, eos_ids, seed, constraint)
        else:
            self._tokens = ChosenTokens(state, options, tokenizer, eos_ids)
        self._stops = StopStrings(options.stop or ())
        self._pieces = stream_answer(tokenizer, self._tokens, state.prompt_ids)
        if options.stop:
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
        return self._stops.found

    @property
    def choices(self) -> list[Choice]:
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


class StopStrings:
    """Ends an answer before its first stop string. Stop strings must not be empty.

    The first stop string is the one completed first. If the same character completes multiple stop strings, the longest one is
    used. This makes the result independent of how the text is split into pieces.

    Attributes:
        found: The stop string that ended the answer, or None.
    """

    def __init__(self, stops: Sequence[str]):
        self.found: str | None = None
        self._stops = stops

    def cut(self, pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        """Yield the pieces from `stream_answer` up to the first stop string. Stop strings in reasoning text are ignored.

        Text that may be the beginning of a stop string is held back until the next piece is available.
        """
        held_back = ""
        for piece, thought in pieces:
            if thought:
                yield piece, True
                continue
            held_back += piece
            if self._find_stop(held_back):
                held_back = held_back[: held_back.index(self.found)]
                break
            certain = len(held_back) - self._partial_stop_length(held_back)
            if certain:
                yield held_back[:certain], False
            held_back = held_back[certain:]
        if held_back:
            yield held_back, False

    def _find_stop(self, text: str) -> bool:
        """Return True if the text contains a stop string, and store the first stop string in `found`."""
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            *_, self.found = min(ends)
        return bool(ends)

    def _partial_stop_length(self, text: str) -> int:
        """Return the length of the longest text suffix that may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
