"""A thread that makes things ahead: order, bounds, and that it is gone whatever ends it."""

import threading
import time

import pytest

from evoprune.session import patches as module
from evoprune.session.patches import prefetched


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def numbers(count, closed=None, problem=None):
    try:
        yield from range(count)
        if problem:
            raise problem
    finally:
        if closed is not None:
            closed.append(threading.current_thread())


def wait_for(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_all_of_it_in_order():
    closed = []
    assert list(prefetched(numbers(1000, closed))) == list(range(1000))
    assert len(closed) == 1 and closed[0] is not threading.current_thread()
    assert list(prefetched(numbers(0))) == [] and list(prefetched(x for x in [None, None])) == [None, None]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_more_than_the_depth_is_made_ahead(depth):
    made = []
    items = prefetched((made.append(i) or i for i in range(20)), depth)
    assert made == []  # nothing before the first is asked for
    for taken in range(1, 15):
        next(items)
        wait_for(lambda taken=taken: len(made) == taken + depth)
        time.sleep(0.005)
        assert len(made) == taken + depth
    items.close()


@pytest.mark.parametrize("problem", [ValueError("no"), KeyboardInterrupt(), MemoryError(), SystemExit(3)])
def test_what_making_raises_comes_after_what_was_made(problem):
    closed, taken = [], []
    with pytest.raises(type(problem)) as caught:
        for item in prefetched(numbers(5, closed, problem)):
            taken.append(item)
    assert caught.value is problem and taken == [0, 1, 2, 3, 4] and len(closed) == 1


def test_whoever_stops_early_stops_the_making_and_waits_for_what_is_being_made():
    closed, going, done = [], threading.Event(), []
    items = prefetched(numbers(10**9, closed))
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert len(closed) == 1 and list(items) == []
    prefetched(numbers(3, closed)).close()  # before it began
    assert len(closed) == 1

    def slow():
        yield 0
        going.set()
        time.sleep(0.05)
        done.append(1)
        yield 1

    items = prefetched(slow())
    next(items)
    assert going.wait(10)
    items.close()
    assert done == [1]


def test_what_hangs_is_not_waited_for_to_its_end(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    going, released, closed = threading.Event(), threading.Event(), []

    def hangs():
        try:
            yield 0
            going.set()
            assert released.wait(60)
            yield 1
        finally:
            closed.append(1)

    items = prefetched(hangs())
    next(items)
    assert going.wait(10)
    before = threading.enumerate()
    items.close()
    (left,) = (thread for thread in threading.enumerate() if thread.name == "evoprune-prefetch")
    assert left in before and left.daemon and closed == []
    released.set()
    left.join(10)
    assert closed == [1]
