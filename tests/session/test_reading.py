"""Test the `Reading` class: the order of chunks, shared memory, taking turns, and that no thread is ever left behind."""

import os
import threading
import time
from contextlib import closing
from dataclasses import dataclass

import pytest

from evoprune.session import reading as module
from evoprune.session.reading import Reading, ReadingGroup, probed
from evoprune.video import Scope, Stopped
from tests.threads import check_ended

GATE_S = 60  # longer than `check_ended` waits, so a thread that is left at a gate is found


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    check_ended(before)


@dataclass
class Chunk:
    number: int
    nbytes: int = 1


def numbers(count, closed=None, problem=None, made=None):
    """Return a source of `count` chunks, which records the chunks that it makes and the thread that closes it."""

    def source(reading):
        try:
            for number in range(count):
                if made is not None:
                    made.append(number)
                yield Chunk(number)
            if problem:
                raise problem
        finally:
            if closed is not None:
                closed.append(threading.current_thread())

    return source


def taken(reading):
    return [chunk.number for chunk in reading.chunks()]


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_all_of_it_in_order():
    closed = []
    with closing(Reading(numbers(1000, closed))) as reading:
        assert taken(reading) == list(range(1000)) and reading.is_complete
    assert len(closed) == 1 and closed[0] is not threading.current_thread()
    with closing(Reading(numbers(0))) as reading:
        assert taken(reading) == []


@pytest.mark.parametrize("room", [2, 3, 5])
def test_chunks_that_wait_are_bounded(room):
    """While chunks wait, the next one is already made, unless it would exceed the bound."""
    made = []
    with closing(Reading(numbers(20, made=made), ReadingGroup(room))) as reading:
        chunks = reading.chunks()
        for count in range(1, 12):
            next(chunks)
            wait_for(lambda count=count: len(made) == count + room - 1)
            time.sleep(0.005)
            assert len(made) == count + room - 1


def test_without_room_one_chunk_at_a_time_is_made():
    made = []
    with closing(Reading(numbers(5, made=made), ReadingGroup(0))) as reading:
        assert [(chunk.number, len(made) <= chunk.number + 2) for chunk in reading.chunks()] == [
            (number, True) for number in range(5)
        ]


def test_readings_share_memory_and_take_turns():
    made = [], []
    with ReadingGroup(4) as group:
        first, second = (Reading(numbers(10, made=each), group) for each in made)
        wait_for(lambda: group.held_bytes == 3)
        time.sleep(0.02)
        assert (len(made[0]), len(made[1]), group.held_bytes) == (3, 0, 3)
        assert taken(first) == list(range(10))
        wait_for(lambda: group.held_bytes == 3)
        assert taken(second) == list(range(10)) and group.held_bytes == 0 and not group.unfinished


def test_as_many_read_at_once_as_are_allowed():
    gate, begun = threading.Event(), []

    def source(number, reading):
        begun.append(number)
        assert gate.wait(GATE_S)
        yield Chunk(number)

    with ReadingGroup(at_once=2) as group:
        readings = [Reading(lambda reading, number=number: source(number, reading), group) for number in range(4)]
        wait_for(lambda: len(begun) == 2)
        time.sleep(0.02)
        assert begun == [0, 1]
        gate.set()
        assert [taken(reading) for reading in readings] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("problem", [ValueError("no"), KeyboardInterrupt(), MemoryError(), SystemExit(3)])
def test_what_making_raises_comes_after_what_was_made(problem):
    closed, got = [], []
    with closing(Reading(numbers(5, closed, problem))) as reading:
        with pytest.raises(type(problem)) as caught:
            for chunk in reading.chunks():
                got.append(chunk.number)
        assert caught.value is problem and got == [0, 1, 2, 3, 4] and len(closed) == 1 and not reading.is_complete


def test_closing_stops_the_making_and_waits_for_the_chunk_that_is_being_made():
    closed, going, done, dropped = [], threading.Event(), [], []

    def source(reading):
        try:
            yield Chunk(0)
            going.set()
            time.sleep(0.05)
            done.append(1)
            yield Chunk(1)
        finally:
            closed.append(1)

    reading = Reading(source, drop=dropped.append)
    assert going.wait(GATE_S)
    reading.close()
    assert done == closed == [1] and [chunk.number for chunk in dropped] == [0, 1]
    with pytest.raises(Stopped):
        next(reading.chunks())
    reading.close()


def test_what_hangs_is_not_waited_for_to_its_end(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    going, released, closed = threading.Event(), threading.Event(), []

    def hangs(reading):
        try:
            yield Chunk(0)
            going.set()
            assert released.wait(GATE_S)
            yield Chunk(1)
        finally:
            closed.append(1)

    before = set(threading.enumerate())
    reading = Reading(hangs)
    assert going.wait(GATE_S)
    reading.close()
    (left,) = set(threading.enumerate()) - before
    assert left.name == "evoprune-reading" and left.daemon and closed == []
    released.set()
    left.join(30)
    assert closed == [1]


@pytest.mark.parametrize("shared", [True, False])
def test_a_reading_stops_with_the_thread_that_made_it_unless_it_is_shared(shared):
    gate, scope, made = threading.Event(), Scope(), []

    def source(reading):
        assert gate.wait(GATE_S)
        yield Chunk(0)

    def begins():
        scope.enter()
        made.append(Reading(source, shared=shared))

    thread = threading.Thread(target=begins)
    thread.start()
    thread.join()
    scope.stop()
    gate.set()
    (reading,) = made
    if shared:
        assert taken(reading) == [0]
    else:
        with pytest.raises(Stopped):
            taken(reading)
    reading.close()


def test_several_threads_take_what_is_shared():
    gate = threading.Event()

    def source(reading):
        for number in range(3):
            yield Chunk(number)
            assert gate.wait(GATE_S)

    with closing(Reading(source, shared=True)) as reading:
        got = []
        threads = [threading.Thread(target=lambda: got.append(taken(reading))) for _ in range(3)]
        for thread in threads:
            thread.start()
        gate.set()
        for thread in threads:
            thread.join()
        assert got == [[0, 1, 2]] * 3 and taken(reading) == [0, 1, 2]


def test_waiting_ends_where_nothing_more_may_be_made():
    with closing(Reading(numbers(9), ReadingGroup(3))) as reading:
        reading.wait()
        assert not reading.has_ended
        assert taken(reading) == list(range(9))
    reading = Reading(numbers(9))
    reading.wait()
    assert reading.is_complete
    reading.close()


def test_too_many_threads(monkeypatch):
    def refuses(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    with closing(Reading(numbers(3))) as reading, pytest.raises(RuntimeError, match="can't start"):
        taken(reading)


def test_files_are_probed_again_only_if_they_have_changed(tmp_path, monkeypatch):
    asked, path = [], tmp_path / "clip.mp4"
    monkeypatch.setattr(module, "probe", lambda path, folder_fps: asked.append(path) or object())
    path.write_bytes(b"1")
    first = probed(path, folder_fps=2.0)
    assert probed(str(path), folder_fps=2.0) is first is not probed(path, folder_fps=1.0)
    status = os.stat(path)
    path.write_bytes(b"2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert probed(path, folder_fps=2.0) is not first and len(asked) == 3
    path.unlink()
    for _ in range(2):
        probed(path, folder_fps=2.0)
    assert len(asked) == 5
