"""Test on a simulated clock which frames are skipped while they wait for the encoder, and how large the lag grows."""

import threading
import time

import numpy as np
import pytest

from evoprune.live.feed import END, Backlog, LiveFeed

WINDOW_S, STEP_S = 8.0, 0.5
FRAME = np.zeros((1, 1, 3), np.uint8)


def live(cost_s, seconds, *, window_cost_s=0.0, busy=lambda now: 0.0, at_once=True):
    """Simulate 10 frames per second, and an encoder that needs `cost_s` per frame plus `window_cost_s` per window.

    Args:
        busy: seconds that something else occupies the encoder, as a function of the time.
        at_once: whether to encode a window right after its last frame, if that frame was taken. Otherwise, the window is encoded
            before the first frame of the next one.

    Returns:
        The backlog, and (time, lag, stride) for each frame that the encoder took.
    """
    now = [0.0]
    backlog, looked = Backlog(WINDOW_S, STEP_S, lambda: now[0]), []

    free_s, waiting, window, encoding = 0.0, [], 0, False
    for number in range(round(seconds * 10)):
        now[0] = number / 10
        if now[0] >= backlog.due() - 1e-9:
            backlog.put(now[0], FRAME)
        while free_s <= now[0]:
            if encoding:
                backlog.encoded()
                encoding = False
            at, found = now[0], backlog.take(0.0)
            if found is None:  # the encoder waits for 0.1 s
                backlog.rest(0.1, source_waits=False)
                free_s = at + 0.1
                break
            waiting.append(found)
            looked.append((found[0], backlog.lag_s, backlog.stride))
            free_s = at + busy(at)
            last = at_once and found[0] % WINDOW_S >= WINDOW_S - STEP_S
            if last or found[0] // WINDOW_S > window:
                window, encoding = found[0] // WINDOW_S + last, True
                free_s += cost_s * len(waiting) + window_cost_s
                waiting = []
    return backlog, looked


def test_nothing_is_skipped_where_the_encoder_is_fast_enough():
    backlog, looked = live(0.4, 200)
    assert backlog.skipped == 0 and backlog.stride == 1
    assert [time_s for time_s, _, _ in looked] == pytest.approx(np.arange(len(looked)) * STEP_S)
    assert max(lag for _, lag, _ in looked) < WINDOW_S


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("cost_s", [0.7, 1.5, 3.0])
def test_frames_are_skipped_evenly_where_it_is_too_slow(cost_s, at_once):
    backlog, looked = live(cost_s, 1200, at_once=at_once)
    late = [each for each in looked if each[0] > 300]
    assert max(lag for _, lag, _ in looked) < 2 * WINDOW_S + 16 * cost_s
    steps = np.diff([time_s for time_s, _, _ in late])
    least = cost_s / STEP_S  # lower bound on the stride
    assert least / 1.01 <= np.mean(steps) / STEP_S < 1.2 * least  # at least 0.8 of the encoder's throughput
    common, counts = np.unique(steps.round(6), return_counts=True)
    assert counts[(common >= STEP_S * (least - 1)) & (common <= STEP_S * (least * 1.2 + 1))].sum() > 0.9 * len(steps)
    strides = [stride for _, _, stride in late]
    assert max(strides) < 1.1 * min(strides)
    due = looked[-1][0] / STEP_S + 1
    assert abs(due - len(looked) - backlog.skipped) <= 2 * WINDOW_S / STEP_S  # frames still waiting


def test_it_never_falls_behind_without_bound():
    """Each window takes longer than it lasts even with skipping, so whole windows are dropped."""
    backlog, looked = live(0.1, 1200, window_cost_s=20.0)
    assert max(lag for _, lag, _ in looked) < 2 * WINDOW_S + 25
    assert backlog.skipped > 1000 and max(stride for _, _, stride in looked) == 8  # two frames per window


def test_of_frames_that_wait_every_second_goes_once_a_window_and_then_the_oldest():
    """The encoder takes no frames. No frame waits for more than two windows."""
    now, counted = [0.0], {}
    backlog = Backlog(WINDOW_S, STEP_S, lambda: now[0])
    for number in range(41):
        now[0] = number * STEP_S
        backlog.put(now[0], FRAME)
        counted[now[0]] = backlog.skipped
    assert counted[11.5] == 0 and counted[12.0] == counted[15.5] == 12 and counted[16.0] == 13
    assert counted[19.5] == 16 and counted[20.0] == 16 + 12 + 1
    oldest, _ = backlog.take(0.0)
    assert now[0] - oldest < 2 * WINDOW_S and backlog.lag_s == now[0] - oldest


def test_it_recovers_after_a_burst_of_other_work():
    backlog, looked = live(0.3, 400, busy=lambda now: 12.0 if 100 <= now < 101 else 0.0)
    assert backlog.skipped > 0 and backlog.stride == 1
    assert all(lag < WINDOW_S for time_s, lag, _ in looked if not 90 < time_s < 130)
    assert [each[2] for each in looked if each[0] > 160] == [1] * sum(each[0] > 160 for each in looked)


def test_what_comes_early_waits_and_is_not_skipped():
    """A file is read at full speed, and the encoder is slower than the reader but faster than real time."""
    backlog, found = Backlog(WINDOW_S, STEP_S), []

    def put():
        for number in range(200):
            backlog.put(number * STEP_S, FRAME)
        backlog.end()

    thread = threading.Thread(target=put)
    thread.start()
    while (each := backlog.take(0.1)) or not backlog.ended:
        if each:
            found.append(each[0])
    thread.join()
    assert backlog.skipped == 0 and found == [number * STEP_S for number in range(200)]
    # The first 20 s of frames arrive and are taken at once; later frames cost more time than real time allows.
    now = [0.0]
    backlog = Backlog(WINDOW_S, STEP_S, lambda: now[0])
    for number in range(64):
        backlog.put(number * STEP_S, FRAME)
        while number < 40 and backlog.take(0.0):
            pass
    now[0] = 13.0
    thread = threading.Thread(target=backlog.put, args=(32.0, FRAME))
    thread.start()
    backlog.take(0.0)
    thread.join()
    assert backlog.skipped == 0 and backlog.lag_s == 0.0


def test_a_stall_is_no_lag():
    now = [0.0]
    backlog = Backlog(WINDOW_S, STEP_S, lambda: now[0])
    for number in range(60):
        time_s = number * STEP_S + (50.0 if number >= 40 else 0.0)  # a gap of 50 s without frames
        now[0] = time_s + (100.0 if number >= 20 else 0.0)
        backlog.put(time_s, FRAME)
        assert backlog.take(0.0) and backlog.take(0.0) is None
        assert backlog.lag_s == 0.0
    assert backlog.skipped == 0


class Stream:
    """Records the times of the frames that it is fed."""

    step_s, encoded, skipped, lag_s, facts = STEP_S, 0, 0, 0.0, {}

    def __init__(self):
        self.times = []

    def scaled(self, frame):
        return frame

    def add(self, frame, time_s):
        self.times.append(time_s)

    def flush(self):
        self.times.append("flushed")

    def catch_up(self):
        pass

    close = catch_up


class Source:
    """Yields frames at the given times. It waits before the last frame until `go` is set."""

    waits, facts = False, {}

    def __init__(self, times):
        self.times, self.go = times, threading.Event()

    def frames(self, due):
        for time_s in self.times:
            if time_s == self.times[-1]:
                self.go.wait(10)
            yield time_s, FRAME

    def close(self):
        self.go.set()


@pytest.mark.parametrize("times", [[0.0], [0.0, 1.0], [0.0, 0.5, 1.0]])
def test_a_frame_right_before_the_end_is_encoded(times, monkeypatch):
    """The encoder finds no frame, and its thread is stopped for a moment. Meanwhile, the last frame and the end arrive."""
    source, stream, take = Source(times), Stream(), Backlog.take

    def slow(backlog, patience_s):
        taken = take(backlog, patience_s)
        if taken is None:
            source.go.set()
            until = time.monotonic() + 10
            while not backlog.ended and time.monotonic() < until:
                time.sleep(0.001)
        return taken

    monkeypatch.setattr(Backlog, "take", slow)
    feed = LiveFeed(stream, source, WINDOW_S)
    assert feed.ended.wait(10) and feed.problem is None and source.go.is_set()
    feed.__exit__()
    assert stream.times == [*times, "flushed"]


def test_the_end_comes_after_every_frame():
    backlog = Backlog(WINDOW_S, STEP_S)
    assert backlog.take(0.0) is None
    backlog.put(0.0, FRAME)
    backlog.put(0.5, FRAME)
    backlog.end()
    assert [backlog.take(10.0)[0] for _ in range(2)] == [0.0, 0.5]
    assert backlog.take(10.0) is END and backlog.take(10.0) is END
    backlog = Backlog(WINDOW_S, STEP_S)
    backlog.put(0.0, FRAME)
    backlog.end(drop=True)
    assert backlog.take(10.0) is END
