"""Tests of the stage times computed from intervals."""

import random
import threading

import pytest

from evoprune.timeline import Interval, Timeline, account, this_thread

MAIN, READER, HEARER = 0, 1, 2


def test_work_in_another_thread_is_hidden_unless_the_thread_waits_for_it():
    intervals = [
        Interval("plan", MAIN, 0, 1),
        Interval("read", READER, 1, 5),
        Interval("preprocess", READER, 4, 5),  # nested
        Interval("encode", MAIN, 2, 9),
        Interval("read", MAIN, 3, 6, waiting=True),  # nested; the reader ended a second earlier
    ]
    found = account(intervals, MAIN, 2, 9)
    assert found.stages == {"plan": 1, "read": 3 + 1, "preprocess": 1, "encode": 4}
    assert (found.overlap, found.waited, found.wall) == (2, 3, 8)
    assert sum(found.stages.values()) - found.overlap == found.wall


def test_waiting_of_another_thread_is_neither_work_nor_overlap():
    intervals = [
        Interval("read", HEARER, 0, 3),
        Interval("read", READER, 1, 4),
        Interval("read", READER, 1, 3, waiting=True),
        Interval("encode", MAIN, 5, 6),
    ]
    found = account(intervals, MAIN, 5, 6)
    assert (found.stages, found.overlap, found.waited) == ({"read": 4, "encode": 1}, 4, 0)


def test_an_interval_is_reported_once():
    timeline = Timeline()
    with timeline.stage("read"):
        pass
    assert [each.stage for each in timeline.take()] == ["read"] and timeline.take() == []


def test_threads_have_numbers_of_their_own():
    found = [this_thread()]
    for _ in range(3):
        thread = threading.Thread(target=lambda: found.append(this_thread()))
        thread.start()
        thread.join()
    assert len(set(found)) == 4 and found[0] == this_thread()


def nested(chance: random.Random, thread: int, start: float, end: float, depth: int = 0) -> list[Interval]:
    """Return random intervals of a thread. Only the main thread waits."""
    made, at = [], start
    while at < end:
        until = min(end, at + chance.choice((0.0, 1.0, 2.0, 5.0)) + 0.5 * depth)
        if chance.random() < 0.7:
            waiting = thread == MAIN and depth > 0 and chance.random() < 0.5
            made.append(Interval(chance.choice("abc"), thread, at, until, waiting))
            if depth < 2 and not waiting:
                made += nested(chance, thread, at, until, depth + 1)
        at = max(until, at + 0.25)
    return made


@pytest.mark.few(50)
@pytest.mark.parametrize("seed", range(200))
def test_stages_and_wall_time_add_up(seed):
    """The stages minus the overlap are the time in which the thread did something, for any interleaving."""
    chance = random.Random(seed)
    intervals = [each for thread in (MAIN, READER, HEARER) for each in nested(chance, thread, 0.0, 40.0)]
    chance.shuffle(intervals)
    start = chance.choice((0.0, 10.0, 20.0))
    found = account(intervals, MAIN, start, 40.0)
    outer = [each for each in intervals if each.thread == MAIN]
    ticks = [0.125 * tick + 0.0625 for tick in range(320)]
    busy = 0.125 * sum(any(each.start < tick < each.end for each in outer) for tick in ticks)
    assert sum(found.stages.values()) - found.overlap == pytest.approx(busy)
    before = 0.125 * sum(any(each.start < tick < each.end for each in outer) for tick in ticks if tick < start)
    assert found.wall == pytest.approx(before + 40.0 - start)
    assert found.overlap >= -1e-9 and all(spent >= 0 for spent in found.stages.values())
