"""The loop that answers a batch's rows on this machine while the next videos are prefetched (session/upcoming.py)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import TypeVar

from evoprune.backend import empty_cache
from evoprune.batch.output import Settings
from evoprune.batch.rows import Row, Span
from evoprune.errors import OutOfMemory, callback_errors, error_record
from evoprune.language import Turn
from evoprune.report import Report
from evoprune.session import Cache, EncodedInputs, OpenInputs, ReadAhead, Session, in_flight, open_inputs
from evoprune.signatures import suggests
from evoprune.util import without_password

T = TypeVar("T")


@suggests
def answers(
    session: Session,
    spans: Iterable[Span],
    settings: Settings,
    cache: Cache | None = None,
    on_failure: Callable[[Exception], None] = lambda problem: None,
    ahead: ReadAhead | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Report]:
    """Yield a record for each row as soon as it is answered. If a row fails, its record contains the error.

    Args:
        session: The loaded model with its pruning settings.
        spans: The rows, in groups that share an encoding.
        settings: The options of the batch.
        cache: The disk cache for encoded inputs, or None.
        on_failure: Called with the exception whenever a row or its inputs fail.
        ahead: A prefetch that may already have read the first inputs, or None.
        progress: See `session.encoding.OpenInputs.encode`. Spans report their progress sequentially.
        on_wait: Called after each encoding with the time spent waiting for reading and preprocessing, in seconds.
    """

    def opened(span: Span) -> OpenInputs:
        first = span.rows[0]
        sampling = settings.sampling.with_overrides(**span.sampling)
        names = [without_password(name) for name in first.inputs]
        return open_inputs(session, first.paths, sampling, names=names, cache=cache, ahead=ahead)

    with callback_errors() as passing, closing(in_flight(spans, opened, session.loaded, on_wait)) as prepared:
        for span, inputs in prepared:
            yield from _answer_span(span, inputs, settings, on_failure, passing(progress), passing(on_wait))


def _answer_span(
    span: Span,
    inputs: OpenInputs | Exception,
    settings: Settings,
    on_failure: Callable[[Exception], None],
    progress: Callable[[str, int, int], None] | None,
    on_wait: Callable[[float], None],
) -> Iterator[Report]:
    def encode() -> EncodedInputs:
        if isinstance(inputs, Exception):
            raise inputs
        with inputs:
            encoded = inputs.encode(progress)
        on_wait(encoded.waited_seconds)
        return encoded

    def answered(row: Row) -> Report:
        generation = row.generation(settings.generation)
        asked = encoded
        if row.earlier:
            asked = encoded.chat(generation.system, Turn.to_messages(row.earlier))
        answer = asked.ask(row.prompt, last=row is span.rows[-1], **vars(generation))
        str(answer)  # generates the entire answer
        return answer.report

    encoded, error = _attempt(encode, on_failure)
    for row in span.rows:
        report = None
        if encoded:
            report, error = _attempt(partial(answered, row), on_failure)
        if report:
            yield settings.complete(report, row)
        else:
            yield settings.failed(row, error)


def _attempt(work: Callable[[], T], on_failure: Callable[[Exception], None]) -> tuple[T | None, dict | None]:
    """Call `work` and return its result, or its error in the record format.

    When this function returns, the exception and all memory referenced by it have been freed.
    """
    try:
        return work(), None
    except Exception as problem:
        on_failure(problem)
        error = error_record(problem)
    if error["type"] == OutOfMemory.type:
        empty_cache()
    return None, error
