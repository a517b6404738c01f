"""Records work as intervals of time, and computes how long each stage took from them. Does not import torch.

Every thread that works on an input records intervals. `account` is the only place that turns them into stage times, the overlap,
and the waiting time.
"""

import threading
import time
from bisect import bisect
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from evoprune.errors import memory_guard

T = TypeVar("T")
Span = tuple[float, float]  # start and end in seconds

_numbers = count()
_this = threading.local()


def now() -> float:
    """Return the current time in seconds."""
    return time.perf_counter()


def this_thread() -> int:
    """Return a number for the current thread. Unlike `threading.get_ident`, it is never reused."""
    if not hasattr(_this, "number"):
        _this.number = next(_numbers)
    return _this.number


@dataclass(frozen=True)
class Interval:
    """A time during which a thread worked on a stage, including intervals of other stages nested in it."""

    stage: str
    thread: int  # from `this_thread`
    start: float
    end: float
    waiting: bool = False  # whether the thread only waited until another thread had done this work


class Timeline:
    """A thread-safe list of intervals.

    Args:
        now: The clock. Defaults to the module's `now`.
    """

    def __init__(self, now: Callable[[], float] | None = None):
        self._now = now or globals()["now"]
        self._intervals: list[Interval] = []

    @contextmanager
    def stage(self, name: str, waiting: bool = False) -> Iterator[None]:
        """Record a `with` block as an interval. If memory runs out inside the block, the error mentions the stage."""
        start = self._now()
        try:
            with memory_guard(name):
                yield
        finally:
            self.add([Interval(name, this_thread(), start, self._now(), waiting)])

    def each(self, name: str, items: Iterable[T], waiting: bool = False) -> Iterator[T]:
        """Yield items, and record the time spent producing each item, excluding the time spent in the consumer."""
        source = iter(items)
        try:
            while True:
                with self.stage(name, waiting):
                    item = next(source, None)
                if item is None:
                    return
                yield item
                del item
        finally:
            if isinstance(source, Generator):
                source.close()

    def add(self, intervals: Iterable[Interval]) -> None:
        """Add intervals that another timeline recorded."""
        self._intervals.extend(intervals)

    def take(self) -> list[Interval]:
        """Remove and return all intervals, so that each is reported only once."""
        taken, self._intervals = self._intervals, []
        return taken


@dataclass(frozen=True)
class Account:
    """The result of `account`. All times are in seconds."""

    stages: dict[str, float]  # time spent in each stage, in any thread
    overlap: float  # time spent in other threads that the thread didn't have to wait for
    waited: float  # time the thread waited for other threads
    wall: float  # time the thread spent on this work


def account(intervals: Iterable[Interval], thread: int, start: float, end: float) -> Account:
    """Compute stage times from the intervals of a piece of work that `thread` did from `start` to `end`.

    The thread may have begun the work before `start`; its earlier intervals count too. A nested interval
    counts only for its own stage. If the thread waited longer than another thread worked, for example because
    the machine was busy, the rest of the waiting time counts for the stage that it waited for.

    The sum of all stages minus the overlap is the time covered by the thread's own intervals.
    """
    own = [each for each in intervals if each.thread == thread]
    others = [each for each in intervals if each.thread != thread]
    stages: dict[str, float] = {}
    waits: list[tuple[str, Span]] = []
    for interval, spans in _exclusive(own):
        if interval.waiting:
            waits += ((interval.stage, span) for span in spans)
        else:
            stages[interval.stage] = stages.get(interval.stage, 0.0) + _length(spans)
    work: list[Span] = []
    for number in {each.thread for each in others}:
        for interval, spans in _exclusive([each for each in others if each.thread == number]):
            if not interval.waiting:
                stages[interval.stage] = stages.get(interval.stage, 0.0) + _length(spans)
                work += spans
    worked = _union(work)
    covered = 0.0
    starts = [first for first, _ in worked]
    for stage, span in waits:
        near = worked[max(0, bisect(starts, span[0]) - 1) : bisect(starts, span[1])]
        hidden = sum(max(0.0, min(span[1], last) - max(span[0], first)) for first, last in near)
        covered += hidden
        stages[stage] = stages.get(stage, 0.0) + span[1] - span[0] - hidden
    before = [(each.start, min(each.end, start)) for each in own if each.start < start]
    return Account(
        stages=stages,
        overlap=_length(work) - covered,
        waited=sum(last - first for _, (first, last) in waits),
        wall=_length(_union(before)) + end - start,
    )


def _exclusive(intervals: list[Interval]) -> Iterator[tuple[Interval, list[Span]]]:
    """Yield a thread's intervals, each with the spans in which no nested interval was running."""
    ordered = sorted(intervals, key=lambda each: (each.start, -each.end))
    for number, outer in enumerate(ordered):
        spans = []
        at = outer.start
        for inner in ordered[number + 1 :]:
            if inner.start >= outer.end:
                break
            if inner.start >= at:
                spans.append((at, inner.start))
                at = inner.end
        spans.append((at, outer.end))
        yield outer, [span for span in spans if span[1] > span[0]]


def _union(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)
