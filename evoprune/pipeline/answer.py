"""An answer: a question's text, in pieces as they are generated, and its report."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from evoprune.errors import error_record
from evoprune.report.records import Report


class Answer(Iterator[str]):
    """An answer, in pieces as they are generated. Generation begins with the first piece.

    An iteration goes on where the one before stopped; over a complete answer it begins again. `str(answer)`, `answer == text` and
    `text in answer` are those of `answer.text`, and generate what is left of it. Sets and dicts take `answer.text` alone.

    Threads may read answers of one video at the same time: each `text` is generated as a whole, one after the other. An iteration
    ends with an error if another answer began between two of its pieces, in this thread or another.

    Attributes:
        report: of this answer; up to date after each piece, complete after the last. `report.answer` is what there is so far.
        ids: its tokens so far, without the one that ends it.

    Raises, while it is read, and again whenever it is read after that; `report.error` says the same:
        UsageError: the question and its answer do not fit into the model's context, or another question was asked meanwhile.
        OutOfMemory. ModelError: numbers that are NaN or infinite.
    """

    def __init__(
        self,
        report: Report,
        pieces: Iterator[str],
        lock: AbstractContextManager | None = None,
        ids: list[int] | None = None,
    ):
        self.report, self.ids = report, [] if ids is None else ids
        self._pieces, self._lock = pieces, lock or nullcontext()
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

    def __str__(self) -> str:
        return self.text

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and text in self.text

    def __eq__(self, other: object) -> bool:
        return self is other or (self.text == str(other) if isinstance(other, str | Answer) else False)

    __hash__ = None  # in a set or as a key it would not be found by the text that it equals

    def close(self) -> None:
        """Stops: nothing more is generated, and `report.finish_reason` is "interrupt" if there was more to come."""
        with self._lock:
            self._pieces.close()
            self.report.finish_reason = self.report.finish_reason or "interrupt"

    def __repr__(self) -> str:
        return f"<Answer {self.report.answer or ''!r}, {self.report.finish_reason or 'not complete'}>"


def _once_more(problem: Exception) -> Exception:
    """The same exception without its traceback, whose frames hold the memory of what failed."""
    again = type(problem).__new__(type(problem), *problem.args)
    vars(again).update(vars(problem))
    return again
