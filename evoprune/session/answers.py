"""Streaming answers, generated while the caller reads them, and multi-turn conversations."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Unpack, overload

from typing_extensions import TypeVar  # a torch dependency; typing.TypeVar supports defaults only since Python 3.13

from evoprune.errors import DoesNotFit, UsageError, error_record
from evoprune.language import GenerationOptions, Turn
from evoprune.report import Report
from evoprune.session.answering import Answering, Inputs, Request
from evoprune.signatures import takes
from evoprune.suggestions import Suggesting, not_callable
from evoprune.util import Uncopied, check_question, counted, from_keywords

if TYPE_CHECKING:
    from evoprune.keywords import GenerationKeywords, UntypedKeywords

Shape = TypeVar("Shape")  # the class passed as `schema`
Parsed = TypeVar("Parsed", default=Any)


class Answer(Uncopied, Suggesting, Iterator[str], Generic[Parsed]):
    """An answer that is generated while the caller reads it, starting when the first piece is requested.

    Iterating over an answer yields pieces of text. A new iteration continues where the previous one stopped, or starts over if the
    answer is already complete. `str(answer)`, `answer == text`, and `text in answer` first generate the rest of the answer, and
    then use `answer.text`. Answers aren't hashable, so use `answer.text` in sets and dicts.

    Multiple threads may read answers about the same video at the same time. Reading `text` generates the complete answer before
    another thread can continue. Iterating lets other threads run between pieces, and fails if one of them starts another answer.

    If the model thinks before answering, the reasoning text isn't part of the answer. It is generated before the first piece and
    stored in `thoughts`.

    If reading an answer raises an error, each later attempt to read it raises the same error, which is also recorded in
    `report.error`.

    Attributes:
        report: The report, which is updated after each piece. `report.answer` is the text generated so far.
        ids: Token IDs generated so far, including thinking tokens but excluding the token that ends the answer.

    Raises:
        UsageError: If the question and the answer don't fit into the model's context, or another question was asked in the
            meantime.
        OutOfMemory: If memory runs out.
        ModelError: If the model's output contains NaN or infinity.
    """

    INSTEAD = "use answer.text and answer.report"
    MEANT: ClassVar = {
        **{name: f"answer.text.{name}" for name in dir(str) if not name.startswith("_")},
        **dict.fromkeys(("json", "to_json", "model_dump_json"), "answer.report.to_json()"),
        **dict.fromkeys(("dict", "to_dict", "model_dump"), "json.loads(answer.report.to_json())"),
        **dict.fromkeys(("content", "answer", "output_text"), "answer.text"),
        "reasoning": "answer.thoughts",
        "usage": "answer.report.tokens",
        "finish_reason": "answer.report.finish_reason",
        "probabilities": "answer.choices",
        "times": "answer.report.time_ms",
        "time_ms": "answer.report.time_ms",
    }

    def __init__(
        self,
        report: Report,
        pieces: Iterator[str],
        lock: AbstractContextManager | None = None,
        answering: Answering | None = None,
    ):
        self.report = report
        self.ids: list[int] = [] if answering is None else answering.ids
        self._answering = answering
        self._pieces = pieces
        self._lock = lock or nullcontext()
        self._problem: Exception | None = None
        self._made: list[str] = []
        self._complete = False

    def __iter__(self) -> Iterator[str]:
        return iter(self._made) if self._complete else self

    def __next__(self) -> str:
        with self._lock:
            # Raise the error again, because a failed generator is exhausted and the answer would otherwise look complete.
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
        """The complete answer text. Reading this property generates the rest of the answer if necessary."""
        with self._lock:
            for _ in self:
                pass
        return self.report.answer or ""

    @property
    def thoughts(self) -> str | None:
        """The reasoning text generated so far, or None if the model answered without thinking."""
        return self.report.thoughts

    @property
    def parsed(self) -> Parsed:
        """The parsed value of an answer with a `schema`, or None if the answer was cut off.

        If `schema` is a class, this is an instance of that class; otherwise, it is the result of `json.loads`. Reading this
        property generates the rest of the answer if necessary.
        """
        str(self)
        instance = None if self._answering is None else self._answering.instance
        return self.report.parsed if instance is None else instance

    @property
    def logprobs(self) -> list[dict[str, Any]] | None:
        """Log probabilities of the tokens in `ids` and of alternatives (docs/json.md), or None without the `logprobs` option."""
        return self.report.logprobs

    @property
    def choices(self) -> list[dict[str, Any]] | None:
        """The allowed answers with their log probabilities and normalized probabilities, or None without the `choices` option.

        Reading this property generates the rest of the answer if necessary.
        """
        str(self)
        return self.report.choices

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return format(self.text, spec)

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and text in self.text

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, str | Answer) and self.text == str(other)

    __hash__ = None  # an answer compares equal to its text, but its hash would differ

    def close(self) -> None:
        """Stop generating. If the answer is incomplete, `report.finish_reason` is set to "interrupt"."""
        with self._lock:
            self._pieces.close()
            self.report.finish_reason = self.report.finish_reason or "interrupt"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the answer in Jupyter and IPython, which call this method instead of `__repr__`."""
        printer.text(self.text)

    def __repr__(self) -> str:
        if self.report.answer is None and self.report.finish_reason is None:
            return "<Answer, not read yet; .text reads it>"
        return f"<Answer {self.report.answer or ''!r}, {self.report.finish_reason or 'not complete'}>"


def _without_traceback(problem: Exception) -> Exception:
    """Return a copy of an exception without its traceback, because the traceback frames would keep tensors in memory.

    If a callback raised an exception that cannot be copied, the exception itself is returned.
    """
    try:
        again = type(problem).__new__(type(problem), *problem.args)
    except TypeError:
        return problem
    vars(again).update(vars(problem))
    return again


class Asked(Inputs, Protocol):
    """The interface of encoded inputs that `Chat` requires, implemented by `asking.Askable`."""

    _lock: AbstractContextManager

    def _answer(self, request: Request) -> Answer: ...

    def _check_fits(self, question: str, options: GenerationOptions, earlier: Sequence[Turn]) -> None: ...


class Chat(Uncopied, Suggesting):
    """A multi-turn conversation about encoded inputs. Use `Askable.chat` to start one.

    The prompt for each question contains all previous turns, formatted using the chat template, and the keys and values of the
    tokens already read are reused. Once an answer is complete, it is added to the conversation without its reasoning text. If the
    answer fails, is closed, or ends while the model is still thinking, the conversation doesn't change.

    When the conversation no longer fits into the model's context, the oldest turns are dropped. The next answer's report then
    includes the warning "history_cut", even before the answer is generated.
    """

    INSTEAD = "use chat.messages"
    if not TYPE_CHECKING:
        __call__ = not_callable("chat.ask(question)")

    def __init__(self, inputs: Asked, system: str | None, turns: Sequence[Turn]):
        self.system = system
        self._inputs = inputs
        self._turns = [*turns]
        self._latest = object()  # identifies the latest question; answers to earlier questions aren't remembered

    def __repr__(self) -> str:
        return f"<Chat, {counted(len(self._turns), 'turn')}, about {self._inputs!r}>"

    @property
    def messages(self) -> list[dict[str, str]]:
        """A copy of the conversation as a list of messages in the format accepted by `Askable.chat`."""
        return Turn.to_messages(self._turns)

    def clear(self) -> None:
        """Delete all turns of the conversation."""
        self._latest = object()
        self._turns = []

    def undo(self) -> str | None:
        """Remove the latest question and its answer, and return the question. Return None if the conversation is empty."""
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
        last: bool = False,
        **options: "Unpack[UntypedKeywords]",
    ) -> Answer[Shape | None]: ...

    @overload
    def ask(
        self,
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        last: bool = False,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer: ...

    @takes(GenerationOptions, names=GenerationOptions.ANSWER)
    def ask(
        self,
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        last: bool = False,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer:
        """Ask the next question.

        The arguments are the same as for `EncodedInputs.ask`, except that the system prompt is set only once, when starting the
        conversation with `chat`. If another question is asked before the answer is complete, reading the rest of the answer raises
        an error.

        Raises:
            UsageError: If `system` differs from the conversation's system prompt, the question doesn't fit into the model's
                context, or an argument is invalid (see `EncodedInputs.ask`).
            OutOfMemory: If the prompt doesn't fit into memory.
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
        answer = self._inputs._answer(Request(question, generation, seed, on_thoughts, earlier, last))
        dropped = len(self._turns) - len(earlier)
        answer.report.conversation = {"turns": len(earlier), "dropped": dropped}
        if earlier and self._inputs._session.loaded.demo:
            answer.report.warnings.append("demo_history")
        if dropped:
            answer.report.warnings.append("history_cut")
        self._latest = latest = object()
        pieces = self._remembered(answer, earlier, latest)
        return Answer(answer.report, pieces, self._inputs._lock, answer._answering)

    def _fitting(self, question: str, generation: GenerationOptions) -> list[Turn]:
        """Return the longest sequence of recent turns that fits into the model's context together with the question.

        Raises:
            DoesNotFit: If the question doesn't fit even without any previous turns.
        """

        def fits(dropped: int) -> bool:
            try:
                self._inputs._check_fits(question, generation, self._turns[dropped:])
            except DoesNotFit:
                return False
            return True

        if fits(0):
            return [*self._turns]
        # Use binary search, because each attempt renders the chat template in a separate process.
        dropped = bisect_left(range(len(self._turns)), True, 1, key=fits)
        turns = self._turns[dropped:]
        if not turns:
            self._inputs._check_fits(question, generation, turns)
        return turns

    def _remembered(self, answer: Answer, earlier: list[Turn], latest: object) -> Iterator[str]:
        """Yield the pieces of an answer and, once it is complete, add it to the conversation."""
        if latest is not self._latest:
            raise UsageError(self._inputs.OVERTAKEN, "finish one answer before asking the next question")
        yield from answer
        text = answer.report.answer
        if latest is self._latest and (text or answer.report.thoughts is None):
            self._turns = [*earlier, Turn(answer.report.question, text)]
