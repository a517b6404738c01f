"""Streaming answers, generated while the caller reads them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from typing_extensions import TypeVar  # a torch dependency; typing.TypeVar supports defaults only since Python 3.13

from evoprune.errors import error_record
from evoprune.report import Report
from evoprune.session.answering import Answering
from evoprune.suggestions import Suggesting
from evoprune.util import Uncopied

if TYPE_CHECKING:
    pass

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
        **{each.name: f"answer.report.{each.name}" for each in fields(Report)},
        **dict.fromkeys(("content", "answer", "output_text", "output", "response", "result", "message"), "answer.text"),
        "reasoning": "answer.thoughts",
        "usage": "answer.report.tokens",
        **dict.fromkeys(("probability", "probabilities", "confidence", "score", "scores"), "answer.choices"),
        **dict.fromkeys(("time", "times", "latency"), "answer.report.time_ms"),
        "kept": "answer.report.pruning.visual_tokens_kept",
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
