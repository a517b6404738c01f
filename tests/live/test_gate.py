"""The threads of a stream: which of them wait for which, and that each goes on in the end."""

import random
import threading
import time
from contextlib import contextmanager

import pytest

from evoprune.errors import UsageError
from evoprune.live.gate import Gate, GiveWay, State

LONGEST_S = 20.0


class Thread(threading.Thread):
    """A thread that has started. `done` is True once its function has returned; `join` raises what it has raised."""

    def __init__(self, function, *arguments):
        super().__init__(daemon=True)
        self.done = False
        self._call = lambda: function(*arguments)
        self._problem = None
        self.start()

    def run(self):
        try:
            self._call()
            self.done = True
        except BaseException as problem:
            self._problem = problem

    def join(self, timeout=LONGEST_S):
        super().join(timeout)
        assert not self.is_alive(), "it still waits"
        if self._problem:
            raise self._problem


def waits(thread):
    """Return True if a thread is still running after a moment."""
    threading.Thread.join(thread, 0.05)
    return thread.is_alive()


@contextmanager
def held(*uses):
    """Use resources in another thread during a `with` block."""
    has, ends = threading.Event(), threading.Event()

    def hold():
        with uses[0]:
            has.set()
            assert ends.wait(LONGEST_S)

    thread = Thread(hold)
    assert has.wait(LONGEST_S)
    yield
    ends.set()
    thread.join()


def using(use, then=lambda: None):
    with use:
        then()


def test_a_thread_waits_for_the_resource_it_uses_and_for_no_other():
    gate = Gate()
    for holder in (gate.window, gate.memory, lambda: gate):
        for other in (gate.window, gate.memory, lambda: gate):
            of_window = [each == gate.window for each in (holder, other)]
            with held(holder()):
                thread = Thread(using, other())
                if of_window[0] is of_window[1]:
                    assert waits(thread)
                else:
                    thread.join()
            thread.join()


def test_a_thread_may_use_a_resource_several_times():
    gate = Gate()
    with gate, gate, gate.memory():
        pass
    with gate.window(), gate.window():
        pass
    for use in (gate.window(), gate):
        Thread(using, use).join()
    assert gate.state is State.IDLE


def test_threads_use_a_resource_in_the_order_of_their_arrival():
    gate = Gate()
    for uses in ([gate.window] * 3, (gate.memory, lambda: gate, gate.memory)):
        order, threads = [], []
        with held(uses[0]()):
            for number, use in enumerate(uses):
                threads.append(Thread(using, use(), lambda number=number, order=order: order.append(number)))
                assert waits(threads[-1])
        for thread in threads:
            thread.join()
        assert order == [0, 1, 2]


def test_the_encoder_waits_for_every_question():
    """Two questions want the memory. After the first one, the encoder still waits for the second."""
    gate = Gate()
    gate.pause()
    ends = threading.Event()
    with held(gate):
        second = Thread(using, gate, lambda: ends.wait(LONGEST_S))
        assert waits(second) and gate.state is State.PREFILLING
    encoder = Thread(gate.pause)
    assert waits(encoder) and gate.state is State.PREFILLING
    ends.set()
    second.join(), encoder.join()
    assert gate.state is State.IDLE


def test_the_encoder_goes_on_while_an_answer_is_generated():
    gate = Gate()
    with held(gate):
        encoder = Thread(gate.pause)
        assert waits(encoder)
        gate.begin_answer(1)
        encoder.join()
        Thread(gate.pause).join()
        assert gate.state is State.GENERATING
        gate.end_answer(0)
        assert gate.state is State.GENERATING  # that was another answer
        gate.end_answer(1)
        assert gate.state is State.PREFILLING


def test_a_prefill_gives_way_to_a_question_and_to_the_end():
    gate = Gate()
    gate.give_way()
    with gate.memory():
        question = Thread(using, gate)
        assert waits(question)
        with pytest.raises(GiveWay):
            gate.give_way()
    question.join()
    gate.give_way()
    gate.close("it ends")
    with pytest.raises(GiveWay):
        gate.give_way()


def test_a_stream_that_is_closed_stops_the_encoder_at_once():
    gate = Gate()
    gate.check()
    with held(gate):
        encoder = Thread(gate.pause)
        assert waits(encoder)
        gate.close("it ends")
        gate.close("for another reason")
        with pytest.raises(UsageError, match="it ends"):
            encoder.join()
    for function in (gate.pause, gate.check):
        with pytest.raises(UsageError, match="it ends"):
            function()
    assert gate.state is State.CLOSED


def test_questions_without_a_pause_do_not_stop_the_stream():
    gate = Gate()
    fed = threading.Event()

    def ask():
        number = 0
        while not fed.is_set():
            number += 1
            with gate.window():
                pass
            with gate:
                gate.begin_answer(number)
            gate.end_answer(number)

    asking = Thread(ask)
    for _ in range(50):
        with gate.window():
            for _ in range(4):
                gate.pause()
            with gate.memory():
                pass
    fed.set()
    asking.join()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_nobody_waits_forever(seed):
    """Frames, questions, errors, and sometimes the end come at random times. Two threads never use a resource at once."""
    rng = random.Random(seed)
    gate = Gate()
    users = {"window": 0, "memory": 0}
    layers = [0]
    windows, waiting, read = [0], [], []
    generations = [0]

    def moment():
        time.sleep(rng.choice([0, 0, 0, 0.0002, 0.001]))

    @contextmanager
    def alone(resource):
        users[resource] += 1
        assert users[resource] == 1
        try:
            moment()
            yield
        finally:
            users[resource] -= 1
            assert not users[resource]

    def prefill():
        """Read the windows that wait. A question may interrupt this."""
        while waiting:
            for _ in range(3):
                gate.give_way()
                moment()
            read.append(waiting.pop(0))

    def feed():
        for _ in range(25):
            try:
                with gate.window(), alone("window"):
                    gate.check()
                    for _ in range(3):
                        gate.pause()
                        layers[0] += 1
                        moment()
                    if rng.random() < 0.1:
                        continue  # the encoder has failed
                    with gate.memory(), alone("memory"):
                        gate.check()
                        waiting.append(windows[0])
                        windows[0] += 1
                        if gate.state is State.GENERATING and len(waiting) > 4:
                            gate.end_answer()
                        if gate.state is not State.GENERATING:
                            prefill()
            except GiveWay:
                continue
            except UsageError:
                assert gate.state is State.CLOSED
                return

    def ask(first):
        for number in range(first, first + 12):
            with gate.window(), alone("window"):
                moment()
            with gate, alone("memory"):
                before = layers[0], generations[0]
                prefilling = gate.state is State.PREFILLING
                moment()
                moment()
                if prefilling and gate.state is State.PREFILLING and before[1] == generations[0]:
                    assert layers[0] - before[0] <= 1
                if rng.random() < 0.2:
                    continue  # the question does not fit
                generations[0] += 1
                gate.begin_answer(number)
            for _ in range(rng.randrange(4)):
                with gate, alone("memory"):
                    moment()
            gate.end_answer(number)

    threads = [Thread(feed), Thread(ask, 100), Thread(ask, 200)]
    closes = seed % 3 == 2
    if closes:
        time.sleep(rng.uniform(0, 0.05))
        gate.close("it ends")
    for thread in threads:
        thread.join()
    with gate.window(), gate.memory():
        assert gate.state is (State.CLOSED if closes else State.IDLE)
        if not closes:
            prefill()
            assert read == list(range(windows[0])) and windows[0] > 10
