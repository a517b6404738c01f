"""Answers, generated piece by piece while they are read, and conversations."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Unpack, overload

from typing_extensions import TypeVar  # a dependency of torch; typing.TypeVar has defaults only from Python 3.13 on

from evoprune.errors import DoesNotFit, UsageError, error_record
from evoprune.language import GenerationOptions, Turn
from evoprune.report import Report
from evoprune.session.session import Session
from evoprune.signatures import takes
from evoprune.util import Uncopied, check_question, counted, from_keywords

if TYPE_CHECKING:
    from evoprune.keywords import GenerationKeywords, UntypedKeywords

Shape = TypeVar("Shape")  # the class given as `schema`
Parsed = TypeVar("Parsed", default=Any)


class Answer(Uncopied, Iterator[str], Generic[Parsed]):
    """An answer, generated piece by piece as it is read. Generation starts with the first piece.

    A new iteration continues where the previous one stopped; over a complete answer, it starts from the beginning. `str(answer)`,
    `answer == text` and `text in answer` work on `answer.text`, and generate the rest of the answer first. An answer is not
    hashable: put `answer.text` into sets and dicts.

    Threads may read answers about the same video at the same time; each `text` is generated as a whole before the next. An
    iteration ends with an error if another answer began between two of its pieces, in this thread or another.

    A model may think first. Its thoughts come before the first piece and are in `thoughts`, not in the answer.

    After an error, reading the answer again raises the same error, and `report.error` records it.

    Attributes:
        report: The report, up to date after each piece. `report.answer` is the text so far.
        ids: Token ids so far, including those in thoughts, without the token that ends the answer.

    Raises:
        UsageError: If the question and its answer do not fit into the model's context, or another question was asked meanwhile.
        OutOfMemory: If memory runs out.
        ModelError: If numbers are NaN or infinite.
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
            if self._problem is not None:  # the generator has ended, and would otherwise look complete
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
        """The whole answer. Generates the rest of it first."""
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
        """The value of an answer generated with the option `schema`, or None if the answer was cut.

        An instance of `schema` if that is a class, otherwise the value that `json.loads` returns. Generates the rest of the answer
        first.
        """
        str(self)
        return self._instances[0] if self._instances else self.report.parsed

    @property
    def logprobs(self) -> list[dict[str, Any]] | None:
        """Log probabilities for each token in `ids` and its alternatives, see docs/json.md. None without the option `logprobs`."""
        return self.report.logprobs

    @property
    def choices(self) -> list[dict[str, Any]] | None:
        """The choices, each with its log probability and its probability among the choices.

        None without the option `choices`. Generates the rest of the answer first.
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

    __hash__ = None  # its hash would differ from the hash of the text that it equals

    def close(self) -> None:
        """Stop generating. `report.finish_reason` becomes "interrupt" unless the answer was complete."""
        with self._lock:
            self._pieces.close()
            self.report.finish_reason = self.report.finish_reason or "interrupt"

    def __repr__(self) -> str:
        if self.report.answer is None and self.report.finish_reason is None:
            return "<Answer, not read yet; .text reads it>"
        return f"<Answer {self.report.answer or ''!r}, {self.report.finish_reason or 'not complete'}>"


def _once_more(problem: Exception) -> Exception:
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
    """A conversation: the model reads each question together with the turns before it. Made by the method `chat` of an `Askable`.

    The model reads the conversation in its own chat template, and reuses the keys and values of everything it has read before.
    Thoughts are not part of the conversation. An answer becomes part of it once it is complete; an answer that failed, was closed,
    or ended inside its thoughts leaves the conversation unchanged.

    If the conversation does not fit into the model's context, the oldest turns are left out. `report.warnings` of the next answer
    then has "history_cut" before the answer is generated.
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
        """The conversation as a new list, in the form that `chat` accepts."""
        return Turn.to_messages(self._turns)

    def clear(self) -> None:
        """Forget all turns."""
        self._latest = object()
        self._turns = []

    def undo(self) -> str | None:
        """Remove the latest question and its answer. Return the question, or None if there is none."""
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

        The answer ends with an error if another question of the conversation is asked before it is complete. For the arguments, see
        `EncodedInputs.ask`; `system` belongs to the conversation.

        Raises:
            UsageError: If another system prompt is given, the question does not fit into the model's context, or
                `EncodedInputs.ask` refuses it.
            OutOfMemory: If the prompt does not fit into memory.
            ModelError: If the chat template is unusable.
            TypeError: If an option is unknown.
        """
        (generation,) = from_keywords(options, GenerationOptions)
        if generation.system not in (None, self.system):
            raise UsageError(
                "a conversation has one system prompt", "give it to chat(), which begins another conversation"
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
        """Return the latest turns that fit into the model's context together with the question.

        Raises:
            DoesNotFit: If the question does not fit even without turns.
        """

        def fits(dropped: int) -> bool:
            try:
                self._inputs._check_fits(question, generation, self._turns[dropped:])
            except DoesNotFit:
                return False
            return True

        if fits(0):
            return [*self._turns]
        # Bisect, because each attempt renders the chat template in a separate process.
        dropped = bisect_left(range(len(self._turns)), True, 1, key=fits)
        turns = self._turns[dropped:]
        if not turns:
            self._inputs._check_fits(question, generation, turns)
        return turns

    def _remembered(self, answer: Answer, earlier: list[Turn], latest: object) -> Iterator[str]:
        """Yield the pieces of an answer, then add the answer to the conversation."""
        if latest is not self._latest:
            raise UsageError(self._inputs.OVERTAKEN, "finish one answer before the next question")
        yield from answer
        said = answer.report.answer
        if latest is self._latest and (said or answer.report.thoughts is None):
            self._turns = [*earlier, Turn(answer.report.question, said)]
