"""Feeds a stream from a live source: one thread reads frames, another one encodes them, whoever asks has a third one."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from math import ceil, floor, inf

import numpy as np

from evoprune.backend import release_omp_threads, use_one_omp_thread
from evoprune.live.source import LiveSource
from evoprune.live.stream import VideoStream

HOLD_S = 0.05  # how often a frame that is held back is looked at again
BUSY = 0.97  # share of its time that the encoder is to be busy while frames are skipped


class Backlog:
    """Hold frames in the order in which they came; one thread puts them, another one takes them.

    Frames that wait for longer than one and a half windows are too many: then every second one of them is skipped, and of those
    that come so many, evenly, that the encoder has time for the others, by what it took for the latest windows. At least two a
    window are looked at. If that is too much, the oldest ones go, so that the encoder is at most two windows behind. Nothing is
    skipped that comes earlier than its own time says, as from a file that is read as fast as it can be: then `put` waits.

    `step_s`, from one frame that is due to the next, may change. `now`: the time, in seconds.
    """

    def __init__(self, window_s: float, step_s: float, now: Callable[[], float] = time.monotonic):
        self.window_s = window_s
        self.step_s = step_s
        self.stride = 1.0  # of so many frames that are due, one is looked at; no whole number
        self.skipped = 0  # frames that were due, and are not looked at
        self.lag_s = 0.0  # how far the frame that was taken last is behind the source
        self.ended = False  # whether no frame will come
        self._now = now
        self._changed = threading.Condition()
        self._waiting: deque[tuple[float, np.ndarray]] = deque()
        self._late_s = -inf  # the time at which a frame of 0 s comes without any lag
        # of the latest frame; from where on the next one is due
        self._last_s = -inf
        self._next_s = 0.0
        self._hungry = True
        self._thinned = -inf
        self._since = now()
        self._idle = 0.0
        self._taken = 0
        self._busy_s = self._looked = 0.0  # of the latest windows, each with half of the weight of the next one

    def due(self) -> float:
        """Return from which time on a frame is wanted, in seconds of the source."""
        if self.stride == 1 and self._last_s >= 0:
            return (self._slot(self._last_s) + 1) * self.step_s
        return ceil(self._next_s / self.step_s - 1e-6) * self.step_s

    def put(self, time_s: float, frame: np.ndarray) -> None:
        """Appends a frame that is due; waits where there are enough, and the source is early."""
        with self._changed:
            if self._hungry:  # the encoder waits for it, so it is not late
                self._late_s = max(self._now() - time_s, self._late_s)
            max_span_s = 1.5 * self.window_s  # while a window is encoded, almost as much comes
            while self._span(time_s) >= max_span_s and not self.ended:
                if self._now() - self._late_s - self._waiting[0][0] >= max_span_s - 1e-6:
                    self._skip(time_s)
                    break
                self._changed.wait(self.step_s)
            if self._last_s >= 0:
                self.skipped += max(0, self._slot(min(self.due(), time_s)) - self._slot(self._last_s) - 1)
            self._last_s = time_s
            self._next_s = max(self._next_s + self.stride * self.step_s, (self._slot(time_s) + 1) * self.step_s)
            self._waiting.append((time_s, frame))
            self._changed.notify_all()

    def take(self, patience_s: float) -> tuple[float, np.ndarray] | None:
        """Return the oldest frame that waits; None if none came for so long, or if none will."""
        with self._changed:
            begun = self._now()
            if not self._waiting:
                self._hungry = True
                self._changed.wait_for(lambda: self._waiting or self.ended, patience_s)
                self._idle += self._now() - begun
            if not self._waiting:
                return None
            time_s, frame = self._waiting.popleft()
            self._hungry = False
            self.lag_s = max(0.0, self._now() - self._late_s - time_s)
            self._taken += 1
            self._changed.notify_all()
            return time_s, frame

    def encoded(self) -> None:
        """Count a window that was encoded. Where frames are skipped, that tells how many, so that there is time for the others.

        A single window tells little: it may be encoded while frames of the next one are taken.
        """
        with self._changed:
            now = self._now()
            self._busy_s = self._busy_s / 2 + now - self._since - self._idle
            self._looked = self._looked / 2 + self._taken
            if self.stride > 1 and self._looked:
                max_stride = self.window_s / (2 * self.step_s)
                self.stride = max(1.0, min(max_stride, self._busy_s / (self._looked * self.step_s * BUSY)))
            self._since, self._idle, self._taken = now, 0.0, 0

    def early_s(self, time_s: float) -> float:
        """Return how many seconds early a frame of that time is, by its own clock; below 0 if it is late."""
        return self._late_s + time_s - self._now()

    def rest(self, seconds: float, source_waits: bool) -> None:
        """Count time in which the encoder was kept from going on. If the source waited too, that is no lag."""
        with self._changed:
            self._idle += seconds
            if source_waits:
                self._late_s += seconds

    def end(self, drop: bool = False) -> None:
        """Say that no frame will come; what waits can be taken, unless it is to `drop`."""
        with self._changed:
            self.ended = True
            if drop:
                self._waiting.clear()
            self._changed.notify_all()

    def _slot(self, time_s: float) -> int:
        return floor(time_s / self.step_s + 1e-6)

    def _span(self, time_s: float) -> float:
        return time_s - self._waiting[0][0] if self._waiting else 0.0

    def _skip(self, time_s: float) -> None:
        """Skip every second frame of those that wait, once in the time of a window; then the oldest."""
        before = len(self._waiting)
        if self._now() - self._thinned >= self.window_s:
            self._thinned = self._now()
            self._waiting = deque(list(self._waiting)[::2])
            self.stride = max(self.stride, 1.0 + 1e-3)  # from now on it is measured
        while self._span(time_s) >= 2 * self.window_s:
            self._waiting.popleft()
        self.skipped += before - len(self._waiting)


class LiveFeed:
    """Feed frames of a source to a stream until the source ends, or the feed is closed, best by `with`: then both are closed.

    `backlog`: frames between the two. `begun`: set once a frame was fed, or none will be. `ended`: set once all of the source is
    encoded, or reading it failed. `problem`: why it failed. `latest_s`: time of the latest frame that was fed or is held back.
    `ask_s`: when the first question is due, as of `ask_at`.
    """

    def __init__(self, stream: VideoStream, source: LiveSource, window_s: float, ask_s: float = inf):
        self.backlog = Backlog(window_s, 0.5)  # until the first frame tells the step of the stream
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.problem: BaseException | None = None
        self.latest_s = 0.0
        self._stream = stream
        self._source = source
        self._closing = False
        self._asking = threading.Condition()
        self._ask_s = ask_s
        release_omp_threads()  # this thread has loaded the model, and another one encodes
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read, self._encode)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "LiveFeed":
        return self

    def __exit__(self, *problem) -> None:
        self._closing = True
        self._source.close()
        self.backlog.end(drop=True)
        self._stream.close()
        for thread in self._threads:
            thread.join(3.0)

    def ask_at(self, time_s: float) -> None:
        """Feed no frame of this time or later before the next call, so that a question then sees just what is before it.

        Frames of a source that does not wait are held back only while they are early.
        """
        with self._asking:
            self._ask_s = time_s
            self._asking.notify_all()

    def check(self) -> None:
        """Raises why reading or encoding failed."""
        if self.problem:
            raise self.problem

    def _read(self) -> None:
        use_one_omp_thread()  # it only scales frames
        try:
            with closing(self._source.frames(self.backlog.due)) as frames:
                for time_s, frame in frames:
                    self.backlog.put(time_s, self._stream.scaled(frame))
        except BaseException as problem:  # is raised by whoever asks
            self.problem = self.problem or problem
        self.backlog.end()

    def _encode(self) -> None:
        stream = self._stream
        backlog = self.backlog
        try:
            while (timed_frame := backlog.take(0.1)) or not backlog.ended:
                stream.skipped = backlog.skipped
                stream.lag_s = backlog.lag_s
                if timed_frame is None:
                    stream.catch_up()
                    continue
                self._hold(timed_frame[0])
                stream.facts = self._source.facts
                before = stream.encoded
                stream.add(timed_frame[1], timed_frame[0])
                if stream.encoded > before:
                    backlog.encoded()
                backlog.step_s = stream.step_s
                self.begun.set()
            stream.flush()
        except BaseException as problem:
            self.problem = None if self._closing else problem
            self._source.close()
            backlog.end()
        self.begun.set()
        self.ended.set()

    def _hold(self, time_s: float) -> None:
        """Wait with a frame until the questions before it were asked."""
        self.latest_s = time_s
        with self._asking:
            while time_s >= self._ask_s - 1e-6 and not self._closing:
                waits = self._source.waits
                begun = time.monotonic()
                if not waits and self.backlog.early_s(time_s) <= 0:
                    return
                self._asking.wait(HOLD_S)
                self.backlog.rest(time.monotonic() - begun, waits)
