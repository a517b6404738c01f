"""Conversations, and answers that are generated piece by piece while the caller reads them."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Unpack, overload

from typing_extensions import TypeVar  # a dependency of torch; typing.TypeVar has defaults only since Python 3.13

from evoprune.errors import DoesNotFit, UsageError, error_record
from evoprune.language import GenerationOptions, Turn
from evoprune.report import Report
from evoprune.session.session import Session
from evoprune.signatures import takes
from evoprune.util import Uncopied, check_question, counted, from_keywords

if TYPE_CHECKING:
    from evoprune.keywords import GenerationKeywords, UntypedKeywords

Shape = TypeVar("Shape")  # the class that the caller passed as `schema`
Parsed = TypeVar("Parsed", default=Any)


class Answer(Uncopied, Iterator[str], Generic[Parsed]):
    """An answer that is generated piece by piece while the caller reads it. Generation starts when the first piece is requested.

    Iterating over an answer yields its pieces. A new iteration continues where the previous one stopped, or starts from the
    beginning if the answer is complete. `str(answer)`, `answer == text` and `text in answer` first generate the rest of the answer
    and then use `answer.text`. An answer is not hashable, so use `answer.text` in sets and dicts.

    Several threads may read answers about the same video at the same time. Each `text` is generated completely before another
    thread's `text` starts. An iteration fails if any thread starts another answer between two of its pieces.

    If the model thinks before it answers, its thoughts are not part of the answer. They are generated before the first piece and
    stored in `thoughts`.

    If reading the answer raises an error, reading it again raises the same error. The error is also recorded in `report.error`.

    Attributes:
        report: The report, which is updated after each piece. `report.answer` is the text so far.
        ids: Token ids generated so far, including the thoughts but not the token that ends the answer.

    Raises:
        UsageError: If the question and its answer do not fit into the model's context, or another question was asked in the
            meantime.
        OutOfMemory: If memory runs out.
        ModelError: If the model's output contains NaN or infinity.
    """

    INSTEAD = "use answer.text and answer.report"

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
            # Raise the error again. Otherwise the answer would look complete, because a generator that failed is exhausted.
            if self._problem is not None:
                raise _without_traceback(self._problem)
            try:
                self._made.append(next(self._pieces))
                return self._made[-1]
            except StopIteration:
                self._complete = self.report.finish_reason != "interrupt"
                raise
            except Exception as problem:
                self._problem = _without_traceback(problem)
                self.report.finish_reason, self.report.error = "error", error_record(problem)
                raise
            except BaseException:
                self.report.finish_reason = self.report.finish_reason or "interrupt"
                raise

    @property
    def text(self) -> str:
        """The complete answer. If necessary, the rest of the answer is generated first."""
        with self._lock:
            for _ in self:
                pass
        return self.report.answer or ""

    @property
    def thoughts(self) -> str | None:
        """The model's thoughts so far, or None if it did not think."""
        return self.report.thoughts

    @property
    def parsed(self) -> Parsed:
        """The value of an answer that follows a `schema`, or None if the answer was cut short.

        If `schema` is a class, this is an instance of the class. Otherwise it is the value that `json.loads` returns. If necessary,
        the rest of the answer is generated first.
        """
        str(self)
        return self._instances[0] if self._instances else self.report.parsed

    @property
    def logprobs(self) -> list[dict[str, Any]] | None:
        """Log probabilities of each token in `ids` and of its alternatives (docs/json.md). None without the `logprobs` option."""
        return self.report.logprobs

    @property
    def choices(self) -> list[dict[str, Any]] | None:
        """Each choice with its log probability, and its probability among the choices. None without the `choices` option.

        If necessary, the rest of the answer is generated first.
        """
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

    __hash__ = None  # an answer equals its text but would have a different hash

    def close(self) -> None:
        """Stop generating. If the answer is not complete, `report.finish_reason` becomes "interrupt"."""
        with self._lock:
            self._pieces.close()
            self.report.finish_reason = self.report.finish_reason or "interrupt"

    def __repr__(self) -> str:
        if self.report.answer is None and self.report.finish_reason is None:
            return "<Answer, not read yet; .text reads it>"
        return f"<Answer {self.report.answer or ''!r}, {self.report.finish_reason or 'not complete'}>"


def _without_traceback(problem: Exception) -> Exception:
    """Return a copy of an exception without its traceback, whose frames would keep memory alive."""
    again = type(problem).__new__(type(problem), *problem.args)
    vars(again).update(vars(problem))
    return again


class Asked(Protocol):
    """What a conversation is about, such as an `asking.Askable`."""

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
    """A conversation, in which the model reads each question together with all previous turns. `Askable.chat` creates one.

    The conversation is formatted with the model's chat template. The model reuses the keys and values of everything that it has
    already read. Thoughts are not part of the conversation. An answer becomes part of the conversation once it is complete. If the
    answer fails, is closed, or ends while the model is still thinking, the conversation does not change.

    If the conversation no longer fits into the model's context, the oldest turns are dropped. The report of the next answer then
    has the warning "history_cut", even before the answer is generated.
    """

    INSTEAD = "use chat.messages"

    def __init__(self, inputs: Asked, system: str | None, turns: Sequence[Turn]):
        self.system = system
        self._inputs = inputs
        self._turns = [*turns]
        self._latest = object()  # identifies the latest question, because only that one may become a turn

    def __repr__(self) -> str:
        return f"<Chat, {counted(len(self._turns), 'turn')}, about {self._inputs!r}>"

    @property
    def messages(self) -> list[dict[str, str]]:
        """A copy of the conversation in the format that `Askable.chat` accepts."""
        return Turn.to_messages(self._turns)

    def clear(self) -> None:
        """Forget all turns."""
        self._latest = object()
        self._turns = []

    def undo(self) -> str | None:
        """Remove the latest question and its answer. Return the question, or None if the conversation is empty."""
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
        """Ask the next question.

        If another question is asked in this conversation before the answer is complete, reading the answer raises an error. For the
        arguments, see `EncodedInputs.ask`. The system prompt can be set only once, by `chat`.

        Raises:
            UsageError: If `system` differs from the conversation's system prompt, the question does not fit into the model's
                context, or an argument is invalid (see `EncodedInputs.ask`).
            OutOfMemory: If the prompt does not fit into memory.
            ModelError: If the chat template is unusable.
            TypeError: If an option is unknown.
        """
        (generation,) = from_keywords(options, GenerationOptions)
        if generation.system not in (None, self.system):
            raise UsageError(
                "a conversation has one system prompt", "pass it to chat(), which starts another conversation"
            )
        generation = replace(generation, system=self.system)
        check_question(question)
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
        """Return as many of the latest turns as fit into the model's context together with the question.

        Raises:
            DoesNotFit: If the question does not fit even without any turns.
        """

        def fits(dropped: int) -> bool:
            try:
                self._inputs._check_fits(question, generation, self._turns[dropped:])
            except DoesNotFit:
                return False
            return True

        if fits(0):
            return [*self._turns]
        # Use bisection, because every attempt has to render the chat template in a separate process.
        dropped = bisect_left(range(len(self._turns)), True, 1, key=fits)
        turns = self._turns[dropped:]
        if not turns:
            self._inputs._check_fits(question, generation, turns)
        return turns

    def _remembered(self, answer: Answer, earlier: list[Turn], latest: object) -> Iterator[str]:
        """Yield the pieces of an answer, and then add the complete answer to the conversation."""
        if latest is not self._latest:
            raise UsageError(self._inputs.OVERTAKEN, "finish one answer before asking the next question")
        yield from answer
        text = answer.report.answer
        if latest is self._latest and (text or answer.report.thoughts is None):
            self._turns = [*earlier, Turn(answer.report.question, text)]
