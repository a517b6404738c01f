"""Multi-turn conversations about encoded inputs."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, Unpack, overload

from evoprune.errors import DoesNotFit, UsageError
from evoprune.language import GenerationOptions, Turn
from evoprune.session.answering import Answerable, Answering
from evoprune.session.answers import Answer, Shape
from evoprune.signatures import takes
from evoprune.suggestions import Suggesting, not_callable
from evoprune.util import Uncopied, check_question, counted, from_keywords

if TYPE_CHECKING:
    from evoprune.keywords import GenerationKeywords, UntypedKeywords


class Asked(Answerable, Protocol):
    """The interface of encoded inputs that `Chat` requires, implemented by `asking.Askable`."""

    _lock: AbstractContextManager

    def _answer(self, answering: Answering) -> Answer: ...

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
        answer = self._inputs._answer(Answering(question, generation, seed, on_thoughts, earlier, last))
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
