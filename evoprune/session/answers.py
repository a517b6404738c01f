"""What is returned: an answer, whose pieces are generated while it is read, and a conversation."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Unpack, overload

from typing_extensions import TypeVar  # which torch needs; that of Python has defaults from 3.13 on

from evoprune.errors import DoesNotFit, UsageError, error_record
from evoprune.language import Tokenizer, TokenLogprobs, Turn, messages_of
from evoprune.report import Report
from evoprune.session.options import GenerationOptions
from evoprune.session.prompting import check_not_empty
from evoprune.session.session import Session
from evoprune.session.signatures import takes
from evoprune.util import counted, from_keywords

if TYPE_CHECKING:
    from evoprune.session.keywords import GenerationKeywords, UntypedKeywords

Shape = TypeVar("Shape")  # the class that is given as schema
Parsed = TypeVar("Parsed", default=Any)


class Uncopied:
    """Base of what belongs to its process and its model, with caches and locks: pickle and copy refuse it."""

    INSTEAD: ClassVar[str]  # what to do

    def __reduce_ex__(self, protocol: int):
        """Raises TypeError."""
        raise TypeError(f"no {type(self).__name__} can be pickled or copied: {self.INSTEAD}")


class Answer(Uncopied, Iterator[str], Generic[Parsed]):
    """An answer, in pieces as they are generated. Generation begins with the first piece.

    An iteration goes on where the one before stopped; over a complete answer it begins again. `str(answer)`, `answer == text` and
    `text in answer` are those of `answer.text`, and generate what is left of it. Sets and dicts take `answer.text` alone.

    Threads may read answers of one video at the same time: each `text` is generated as a whole, one after the other. An iteration
    ends with an error if another answer began between two of its pieces, in this thread or another.

    A model may think first: its thoughts are no part of the answer, but `thoughts`, and come before the first piece.

    `report` is up to date after each piece, `report.answer` what there is so far; `ids` are its tokens so far, those of thoughts
    among them, without the one that ends it.

    Raises, while it is read, and again whenever it is read after that; `report.error` says the same:
        UsageError: the question and its answer do not fit into the model's context, or another question was asked meanwhile.
        OutOfMemory. ModelError: numbers that are NaN or infinite.
    """

    INSTEAD = "take answer.text and answer.report"

    def __init__(
        self,
        report: Report,
        pieces: Iterator[str],
        lock: AbstractContextManager | None = None,
        ids: list[int] | None = None,
        instances: list[Any] | None = None,
    ):
        self.report = report
        self.ids = [] if ids is None else ids
        self._instances = [] if instances is None else instances
        self._pieces = pieces
        self._lock = lock or nullcontext()
        self._problem: Exception | None = None
        self._made: list[str] = []
        self._complete = False

    def __iter__(self) -> Iterator[str]:
        return iter(self._made) if self._complete else self

    def __next__(self) -> str:
        with self._lock:
            if self._problem is not None:  # the generator has ended, as if the answer were complete
                raise _once_more(self._problem)
            try:
                self._made.append(next(self._pieces))
                return self._made[-1]
            except StopIteration:
                self._complete = self.report.finish_reason != "interrupt"
                raise
            except Exception as problem:
                self._problem = _once_more(problem)
                self.report.finish_reason, self.report.error = "error", error_record(problem)
                raise
            except BaseException:
                self.report.finish_reason = self.report.finish_reason or "interrupt"
                raise

    @property
    def text(self) -> str:
        """The whole answer: generates what is left of it."""
        with self._lock:
            for _ in self:
                pass
        return self.report.answer or ""

    @property
    def thoughts(self) -> str | None:
        """What the model wrote before the answer, as far as it has; None if it did not think."""
        return self.report.thoughts

    @property
    def parsed(self) -> Parsed:
        """The value of a complete answer with the option `schema`, or None if it was cut. Generates what is left of it.

        An instance of `schema` if that is a class, else what `json.loads` returns.
        """
        str(self)
        return self._instances[0] if self._instances else self.report.parsed

    @property
    def logprobs(self) -> list[dict[str, Any]] | None:
        """The log probability of each token of `ids`, and of others in its place, as docs/json.md says; None without the option."""
        return self.report.logprobs

    @property
    def choices(self) -> list[dict[str, Any]] | None:
        """What the option `choices` names, each with its log probability and its probability among them; None without it."""
        str(self)
        return self.report.choices

    def __str__(self) -> str:
        return self.text

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and text in self.text

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, str | Answer) and self.text == str(other)

    __hash__ = None  # in a set or as a key it would not be found by the text that it equals

    def close(self) -> None:
        """Stops: nothing more is generated, and `report.finish_reason` is "interrupt" if there was more to come."""
        with self._lock:
            self._pieces.close()
            self.report.finish_reason = self.report.finish_reason or "interrupt"

    def __repr__(self) -> str:
        if self.report.answer is None and self.report.finish_reason is None:
            return "<Answer, not read yet; .text reads it>"
        return f"<Answer {self.report.answer or ''!r}, {self.report.finish_reason or 'not complete'}>"


def _once_more(problem: Exception) -> Exception:
    """Return the same exception without its traceback, whose frames hold the memory of what failed."""
    again = type(problem).__new__(type(problem), *problem.args)
    vars(again).update(vars(problem))
    return again


def logprobs_record(tokenizer: Tokenizer, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
    """Return the log probabilities of a token, and of others in its place, as reports hold them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.backend.decode([token], skip_special_tokens=False)
        return {"id": token, "token": text, "logprob": logprob, "bytes": [*tokenizer.bytes_of(token)]}

    return entry(token, logprobs.chosen) | {"top_logprobs": [entry(*each) for each in logprobs.top]}


class Asked(Protocol):
    """What a conversation is about: an `asking.Askable`."""

    OVERTAKEN: ClassVar[str]
    _session: Session
    _lock: AbstractContextManager

    def _answer(
        self,
        question: str,
        generation: GenerationOptions,
        seed: int | None,
        on_thoughts: Callable[[str], None] | None,
        earlier: Sequence[Turn] | None = None,
    ) -> Answer: ...

    def _check_fits(self, question: str, options: GenerationOptions, earlier: Sequence[Turn]) -> None: ...


class Chat(Uncopied):
    """A conversation: each question is asked with what was said before. Made by `chat` of what can be asked.

    The model reads all of it, in its own chat template; keys and values of what it has read already are used again. Thoughts are
    not part of it. An answer is, once it is complete: one that failed or was closed leaves the conversation as it was, and so does
    one that ended inside its thoughts. What does not fit into the model's context is left out, the oldest turns first; then
    `report.warnings` of the next answer has "history_cut", before it is generated.
    """

    INSTEAD = "take chat.messages"

    def __init__(self, inputs: Asked, system: str | None, turns: Sequence[Turn]):
        self.system = system
        self._inputs = inputs
        self._turns = [*turns]
        self._latest = object()  # stands for the question that may still become a turn

    def __repr__(self) -> str:
        return f"<Chat, {counted(len(self._turns), 'turn')}, about {self._inputs!r}>"

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, as `chat` takes it, in a list of the caller's own."""
        return messages_of(self._turns)

    def clear(self) -> None:
        """Forgets what was said."""
        self._latest = object()
        self._turns = []

    def undo(self) -> str | None:
        """Takes the latest question back, with its answer. Returns it; None if there is none."""
        self._latest = object()
        return self._turns.pop().question if self._turns else None

    @overload
    def ask(
        self,
        question: str,
        *,
        schema: type[Shape],
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[UntypedKeywords]",
    ) -> Answer[Shape | None]: ...

    @overload
    def ask(
        self,
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer: ...

    @takes(GenerationOptions)
    def ask(
        self,
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer:
        """Asks the next question. The answer ends with an error if another question of the conversation was asked meanwhile.

        Args: as of `EncodedInputs.ask`. `system` belongs to the conversation.

        Raises: as `EncodedInputs.ask`, and what reading its answer raises of a prompt. UsageError: another system prompt.
        """
        (generation,) = from_keywords(options, GenerationOptions)
        if generation.system not in (None, self.system):
            raise UsageError(
                "a conversation has one system prompt", "give it to chat(), which begins another conversation"
            )
        generation = replace(generation, system=self.system)
        check_not_empty(question)
        earlier = self._fitting(question, generation)
        answer = self._inputs._answer(question, generation, seed, on_thoughts, earlier)
        dropped = len(self._turns) - len(earlier)
        answer.report.conversation = {"turns": len(earlier), "dropped": dropped}
        if earlier and self._inputs._session.loaded.demo:
            answer.report.warnings.append("demo_history")
        if dropped:
            answer.report.warnings.append("history_cut")
        self._latest = latest = object()
        pieces = self._remembered(answer, earlier, latest)
        return Answer(answer.report, pieces, self._inputs._lock, answer.ids, answer._instances)

    def _fitting(self, question: str, generation: GenerationOptions) -> list[Turn]:
        """Return the latest turns that fit into the model's context together with the question.

        Raises DoesNotFit: it does not fit alone.
        """

        def fits(dropped: int) -> bool:
            try:
                self._inputs._check_fits(question, generation, self._turns[dropped:])
            except DoesNotFit:
                return False
            return True

        if fits(0):
            return [*self._turns]
        # Few are tried: each is rendered in a process of its own.
        dropped = bisect_left(range(len(self._turns)), True, 1, key=fits)
        turns = self._turns[dropped:]
        if not turns:
            self._inputs._check_fits(question, generation, turns)
        return turns

    def _remembered(self, answer: Answer, earlier: list[Turn], latest: object) -> Iterator[str]:
        """Yield an answer, which then becomes a turn."""
        if latest is not self._latest:
            raise UsageError(self._inputs.OVERTAKEN, "finish one answer before the next question")
        yield from answer
        said = answer.report.answer
        if latest is self._latest and (said or answer.report.thoughts is None):
            self._turns = [*earlier, Turn(answer.report.question, said)]
