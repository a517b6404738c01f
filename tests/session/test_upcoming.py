"""Multiple inputs are read ahead in order, within bounds, and in parallel on idle cores, and no threads are left behind."""

import threading
import time
from types import SimpleNamespace

import pytest

from evoprune.errors import VideoError
from evoprune.session import upcoming
from evoprune.session.encoding import OpenInputs
from evoprune.session.loading.model import LoadedModel
from evoprune.session.upcoming import in_flight, readers
from tests.threads import check_ended
from tests.video.idle import idle_limit

GATE_S = 60  # longer than `check_ended` waits, so a thread that is left at a gate is found


@pytest.fixture(autouse=True)
def no_thread_stays():
    before, idle = set(threading.enumerate()), idle_limit()
    yield
    check_ended(before)
    assert idle_limit() == idle


@pytest.fixture
def ahead_of(monkeypatch):
    """Return a function that calls `in_flight` with `count` readers. No thread starts before the first item is requested."""

    def made(items, opened, count, cores=0, on_wait=lambda seconds: None):
        monkeypatch.setattr(upcoming, "readers", lambda loaded: count)
        return in_flight(items, opened, SimpleNamespace(cores=None, idle_cores=cores), on_wait)

    return made


class Inputs(OpenInputs):
    """Records the methods that are called. If there is a `gate`, `read` waits until it opens or until the inputs are closed."""

    def __init__(self, events, item, gate=None):
        self.events, self.item, self.gate = events, item, gate or threading.Event()
        if gate is None:
            self.gate.set()
        events.append(("open", item))

    def use_cores(self, cores):
        self.cores = cores

    def begin(self):
        pass

    def read(self):
        assert self.gate.wait(GATE_S)
        self.events.append(("read", self.item))

    def close(self):
        self.gate.set()
        self.events.append(("close", self.item))


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_all_items_in_their_order(ahead_of, count):
    events = []

    def opened(item):
        time.sleep(0.003 * (item % 3))
        return Inputs(events, item)

    waited = []
    ahead = ahead_of(range(20), opened, count, on_wait=waited.append)
    taken = [(item, inputs.item) for item, inputs in ahead]
    ahead.close()
    assert taken == [(item, item) for item in range(20)] and list(ahead) == []
    wait_for(lambda: sorted(item for what, item in events if what == "read") == list(range(20)))
    assert "close" not in dict(events)  # the consumer closes the inputs
    assert len(waited) == 20 and sum(waited) > 0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_no_more_are_opened_than_there_is_room_for(ahead_of, count):
    events = []
    ahead = ahead_of(range(100), lambda item: Inputs(events, item), count)
    time.sleep(0.01)
    assert not events  # nothing happens before the first request
    for taken in range(1, 5):
        next(ahead)
        wait_for(lambda taken=taken: events.count(("read", taken - 1 + count)))
        time.sleep(0.01)
        assert {item for _, item in events} == set(range(taken + count))
    ahead.close()
    assert {item for what, item in events if what == "close"} == set(range(4, 4 + count))


def test_one_reader_finishes_one_before_it_begins_the_next(ahead_of):
    """This way, an input that is needed later never slows down the one that is needed next."""
    events, gate = [], threading.Event()
    ahead = ahead_of(range(3), lambda item: Inputs(events, item, gate if item == 0 else None), 1)
    next(ahead)
    time.sleep(0.02)
    assert events == [("open", 0)]
    gate.set()
    wait_for(lambda: ("read", 1) in events)
    ahead.close()


def test_those_behind_the_next_one_share_the_cores(ahead_of):
    gate = threading.Event()
    ahead = ahead_of(range(3), lambda item: Inputs([], item, gate), 3, cores=7)
    assert [inputs.cores for _, inputs in (next(ahead) for _ in range(3))] == [None, 2, 2]
    gate.set()
    ahead.close()


def test_what_opening_raises_is_of_that_item(ahead_of):
    def opened(item):
        if item % 2:
            raise VideoError(f"no {item}")
        return Inputs([], item)

    ahead = ahead_of(range(4), opened, 2)
    assert [str(found) if isinstance(found, Exception) else found.item for _, found in ahead] == [0, "no 1", 2, "no 3"]
    ahead.close()


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_the_program_is_raised(ahead_of, problem):
    def opened(item):
        if item == 1:
            raise problem
        return Inputs([], item)

    ahead = ahead_of(range(4), opened, 1)
    next(ahead)
    with pytest.raises(type(problem)) as caught:
        next(ahead)
    assert caught.value is problem
    ahead.close()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("good", [0, 1, 5])
@pytest.mark.parametrize("problem", [ValueError("a"), VideoError("a"), RuntimeError("a")])
def test_what_the_items_raise_is_raised_after_the_items_before(ahead_of, problem, good, count):
    """So the number of cores has no influence on what the caller gets."""
    events, taken = [], []

    def items():
        yield from range(good)
        raise problem

    ahead = ahead_of(items(), lambda item: Inputs(events, item), count)
    with pytest.raises(type(problem)) as caught:
        for item, inputs in ahead:
            inputs.close()
            taken.append(item)
    assert caught.value is problem and taken == list(range(good)) and list(ahead) == []


@pytest.mark.parametrize("count", [1, 4])
def test_an_interrupt_while_the_next_item_is_made_closes_everything(ahead_of, count):
    events, gate, problem = [], threading.Event(), KeyboardInterrupt()

    def items():
        yield from range(count)
        wait_for(lambda: len(events) == 2 * count - 1)
        raise problem

    ahead = ahead_of(items(), lambda item: Inputs(events, item, gate if item == 0 else None), count)
    with pytest.raises(KeyboardInterrupt) as caught:
        next(ahead)
    assert caught.value is problem
    wait_for(lambda: {("close", item) for item in range(count)} <= set(events))


def test_if_the_callback_raises_the_inputs_are_closed(ahead_of):
    events, problem = [], ValueError("a")

    def raises(seconds):
        raise problem

    ahead = ahead_of(range(3), lambda item: Inputs(events, item), 2, on_wait=raises)
    with pytest.raises(ValueError) as caught:
        next(ahead)
    assert caught.value is problem
    wait_for(
        lambda: {item for what, item in events if what == "close"} == {item for what, item in events if what == "open"}
    )


def test_reading_that_fails_stops_nothing(ahead_of):
    """The error is raised again when the inputs are encoded."""

    class Failing(Inputs):
        def read(self):
            raise RuntimeError("can't start new thread")

    ahead = ahead_of(range(4), lambda item: Failing([], item), 1)
    assert [item for item, _ in ahead] == [0, 1, 2, 3]
    ahead.close()


def test_what_is_opened_too_late_is_closed(ahead_of):
    events, going, gate = [], threading.Event(), threading.Event()

    def opened(item):
        if item:
            going.set()
            assert gate.wait(GATE_S)
        return Inputs(events, item)

    ahead = ahead_of(range(3), opened, 1)
    next(ahead)
    assert going.wait(GATE_S)
    timer = threading.Timer(0.02, gate.set)
    timer.start()
    ahead.close()
    timer.join()
    wait_for(lambda: ("close", 1) in events)


@pytest.mark.parametrize(
    ("device", "cores", "torch_threads", "asked", "memory", "idle", "count"),
    [
        ("cpu", 2, 2, None, None, 0, 1),
        ("cpu", 16, 16, None, None, 0, 1),
        ("cpu", 16, 1, None, None, 15, 7),  # a small model
        ("cpu", 16, 4, 4, None, 0, 1),  # the other cores belong to other programs
        ("cuda", 16, 16, None, None, 15, 7),
        ("cuda", 64, 16, None, None, 63, 8),
        ("cuda", 4, 4, None, None, 3, 1),
        ("cuda", 16, 16, 5, None, 4, 2),
        ("cuda", 1, 1, None, None, 0, 1),
        ("cuda", 16, 16, None, 3 * 2**30, 15, 3),
        ("cuda", 16, 16, None, 2**20, 15, 1),
    ],
)
def test_how_many_are_read_at_a_time(monkeypatch, device, cores, torch_threads, asked, memory, idle, count):
    monkeypatch.setattr("evoprune.backend.limits.Host.available_cores", lambda _: cores)
    monkeypatch.setattr("evoprune.backend.limits.Host.available_memory", lambda _: memory)
    monkeypatch.setattr("torch.get_num_threads", lambda: torch_threads)
    description = SimpleNamespace(device=device, options=SimpleNamespace(cores=asked))
    loaded = LoadedModel(description, *[None] * 9)
    assert (loaded.idle_cores, readers(loaded)) == (idle, count)
