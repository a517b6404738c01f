"""Feeds a stream from a live source. One thread reads frames, and another encodes them while the caller asks questions."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from enum import Enum
from math import ceil, floor, inf
from typing import Literal

import numpy as np

from evoprune.live.omp import release_omp_threads, use_one_omp_thread
from evoprune.live.stream import VideoStream
from evoprune.video import LiveSource

HOLD_S = 0.05  # polling interval in seconds while a frame is held back
TARGET_UTILIZATION = 0.97  # target fraction of time that the encoder is busy while frames are being skipped


class End(Enum):
    """The type of `END`, which is false like None, so that only frames are true."""

    END = False

    def __bool__(self) -> bool:
        return self.value


END = End.END


class Backlog:
    """A queue of frames between the reading thread (`put`) and the encoding thread (`take`).

    If frames wait in the queue for longer than one and a half windows, the encoder is too slow, so every second queued frame is
    skipped. Incoming frames are then evenly thinned to the rate that the encoder achieved in recent windows, but to no fewer than
    two frames per window. If that is still too many, the oldest frames are dropped so that the encoder lags by at most two windows.

    Frames that arrive ahead of their timestamps, such as those from a file read at full speed, are never skipped. In this case,
    `put` blocks until there is room.

    Args:
        window_s: Window length in seconds.
        step_s: Interval in seconds between due frames. It may be changed later.
        now: Function that returns the current time in seconds.
    """

    def __init__(self, window_s: float, step_s: float, now: Callable[[], float] = time.monotonic):
        self.window_s = window_s
        self.step_s = step_s
        self.stride = 1.0  # use one out of this many due frames (may be fractional)
        self.skipped = 0  # number of unused due frames
        self.lag_s = 0.0  # lag behind the source of the last frame returned by `take`, in seconds
        self.ended = False  # True once no more frames will arrive
        self._now = now
        self._changed = threading.Condition()
        self._waiting: deque[tuple[float, np.ndarray]] = deque()
        self._late_s = -inf  # time on the `now` clock at which a frame with timestamp 0 would arrive without lag
        # Timestamp of the latest frame, and due time of the next frame.
        self._last_s = -inf
        self._next_s = 0.0
        self._encoder_waits = True
        self._last_thinned = -inf
        self._since = now()
        self._idle = 0.0
        self._taken = 0
        # Weighted sums over recent windows; each new window halves the weights of all earlier windows.
        self._busy_s = self._looked = 0.0

    def due(self) -> float:
        """Return the time at which the next frame should be read, in seconds on the source's clock."""
        if self.stride == 1 and self._last_s >= 0:
            return (self._slot(self._last_s) + 1) * self.step_s
        return ceil(self._next_s / self.step_s - 1e-6) * self.step_s

    def put(self, time_s: float, frame: np.ndarray) -> None:
        """Add a frame to the queue. Blocks while the queue is full if the source delivers frames ahead of their timestamps."""
        with self._changed:
            if self._encoder_waits:  # the encoder is waiting for this frame, so it isn't late
                self._late_s = max(self._now() - time_s, self._late_s)
            # Almost an entire window of frames arrives while another window is being encoded.
            max_span_s = 1.5 * self.window_s
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

    def take(self, patience_s: float) -> tuple[float, np.ndarray] | Literal[End.END] | None:
        """Remove and return the oldest queued frame.

        Returns:
            The frame's timestamp and pixels; None if no frame arrives within `patience_s` seconds; or `END` if the source has ended
            and all its frames have been taken.
        """
        with self._changed:
            begun = self._now()
            if not self._waiting:
                self._encoder_waits = True
                self._changed.wait_for(lambda: self._waiting or self.ended, patience_s)
                self._idle += self._now() - begun
            if not self._waiting:
                return END if self.ended else None
            time_s, frame = self._waiting.popleft()
            self._encoder_waits = False
            self.lag_s = max(0.0, self._now() - self._late_s - time_s)
            self._taken += 1
            self._changed.notify_all()
            return time_s, frame

    def encoded(self) -> None:
        """Record that a window has been encoded. If frames are being skipped, adjusts the stride to the encoder's speed.

        The encoder's rate is averaged over several windows, because frames of the next window may already be taken from the queue
        while a window is being encoded.
        """
        with self._changed:
            now = self._now()
            self._busy_s = self._busy_s / 2 + now - self._since - self._idle
            self._looked = self._looked / 2 + self._taken
            if self.stride > 1 and self._looked:
                max_stride = self.window_s / (2 * self.step_s)
                self.stride = max(
                    1.0, min(max_stride, self._busy_s / (self._looked * self.step_s * TARGET_UTILIZATION))
                )
            self._since, self._idle, self._taken = now, 0.0, 0

    def early_s(self, time_s: float) -> float:
        """Return how early a frame with timestamp `time_s` would be if it arrived now, in seconds. Negative means late."""
        return self._late_s + time_s - self._now()

    def rest(self, seconds: float, source_waits: bool) -> None:
        """Record that the encoder was held back for some time, which is excluded from its busy time.

        If the source was also waiting (`source_waits`), the time is also excluded from the lag.
        """
        with self._changed:
            self._idle += seconds
            if source_waits:
                self._late_s += seconds

    def end(self, drop: bool = False) -> None:
        """Mark the source as ended. Queued frames remain available unless `drop` is True."""
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
        """Drop every second queued frame, at most once per window. Then drop the oldest frames until the queue is short enough."""
        before = len(self._waiting)
        if self._now() - self._last_thinned >= self.window_s:
            self._last_thinned = self._now()
            self._waiting = deque(list(self._waiting)[::2])
            self.stride = max(self.stride, 1.0 + 1e-3)  # greater than 1, so that `encoded` starts to update it
        while self._span(time_s) >= 2 * self.window_s:
            self._waiting.popleft()
        self.skipped += before - len(self._waiting)


class LiveFeed:
    """Feeds frames from a source to a stream until the source ends or the feed is closed.

    Use the feed as a context manager, which closes both the source and the stream on exit.

    Attributes:
        backlog: The queue of frames between the source and the stream.
        begun: Event that is set once the first frame has been fed, or once it is certain that there will be no frames.
        ended: Event that is set after the entire source has been encoded, or after reading or encoding has failed.
        problem: The exception that stopped reading or encoding, or None.
        latest_s: Timestamp of the latest frame that has been fed or is being held back, in seconds.

    Args:
        ask_s: Time of the first question, in seconds on the source's clock. See `ask_at`.
    """

    TOLERANCE_S = 1e-6  # a frame that precedes a question by less than this, because of rounding, is held back

    def __init__(self, stream: VideoStream, source: LiveSource, window_s: float, ask_s: float = inf):
        self.backlog = Backlog(window_s, 0.5)  # 0.5 is a placeholder; the first frame sets the stream's step
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.problem: BaseException | None = None
        self.latest_s = 0.0
        self._stream = stream
        self._source = source
        self._closing = False
        self._asking = threading.Condition()
        self._ask_s = ask_s
        release_omp_threads()  # this thread loaded the model, but another thread will do the encoding
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
        """Hold back all frames from a given time onward, so that a question sees only the frames before that time.

        The frames are held back until the next call. However, if the source does not wait for its frames to be read, a frame is
        held back only as long as it is early.
        """
        with self._asking:
            self._ask_s = time_s
            self._asking.notify_all()

    def check(self) -> None:
        """Raise the exception that stopped reading or encoding, if any."""
        if self.problem:
            raise self.problem

    def _read(self) -> None:
        use_one_omp_thread()  # this thread only scales frames
        try:
            with closing(self._source.frames(self.backlog.due)) as frames:
                for time_s, frame in frames:
                    self.backlog.put(time_s, self._stream.scaled(frame))
        except BaseException as problem:  # `check` raises it in the thread that asks questions
            self.problem = self.problem or problem
        self.backlog.end()

    def _encode(self) -> None:
        stream = self._stream
        backlog = self.backlog
        try:
            while (timed_frame := backlog.take(0.1)) is not END:
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
        """Block until all questions that precede this frame have been asked."""
        self.latest_s = time_s
        with self._asking:
            while time_s >= self._ask_s - self.TOLERANCE_S and not self._closing:
                waits = self._source.waits
                begun = time.monotonic()
                if not waits and self.backlog.early_s(time_s) <= 0:
                    return
                self._asking.wait(HOLD_S)
                self.backlog.rest(time.monotonic() - begun, waits)
