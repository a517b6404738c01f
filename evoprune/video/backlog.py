"""Frames between a source and the encoder: what waits, and which frames are skipped where the encoder is too slow."""

import threading
import time
from collections import deque
from collections.abc import Callable
from math import floor

import numpy as np

IDLE = 0.55  # share of its time that the encoder waits, above which twice as many frames take no more than all of it


class Backlog:
    """Frames in the order in which they came, one thread puts them, another one takes them.

    Frames that wait for longer than a window are too many: then every second one is skipped, of those that wait and of those that
    come, and again, down to two a window; where that is not enough, the oldest go. So the encoder is at most two windows
    behind. Once it waits for frames for more than half of its time, twice as many are looked at. Nothing is skipped that comes
    earlier than its own time says, as from a file that is read as fast as it can be: then `put` waits.

    Args:
        window_s: of the stream.
        step_s: from one frame that is looked at to the next.
        now: the time, in seconds.

    Attributes:
        step_s: may change.
        stride: of so many frames that are due, one is looked at.
        skipped: frames that were due, and are not looked at.
        lag_s: how far the frame that was taken last is behind the source.
        ended: whether no frame will come.
    """

    def __init__(self, window_s: float, step_s: float, now: Callable[[], float] = time.monotonic):
        self.window_s, self.step_s = window_s, step_s
        self.stride, self.skipped, self.lag_s, self.ended = 1, 0, 0.0, False
        self._now, self._changed = now, threading.Condition()
        self._waiting: deque[tuple[float, np.ndarray]] = deque()
        self._late_s: float | None = None  # the time at which a frame of 0 s comes without any lag
        self._last_s: float | None = None  # of the latest frame
        self._hungry, self._since, self._idle = True, now(), 0.0

    def due(self) -> float:
        """From which time on a frame is wanted, in seconds of the source."""
        return 0.0 if self._last_s is None else (self._slot(self._last_s, self.stride) + 1) * self.stride * self.step_s

    def put(self, time_s: float, frame: np.ndarray) -> None:
        """Appends a frame that is due; waits where there are enough, and the source is early."""
        with self._changed:
            if self._late_s is None or (self._hungry and not self._waiting):  # the encoder waits for it: it is not late
                self._late_s = max(self._now() - time_s, -np.inf if self._late_s is None else self._late_s)
            while self._span(time_s) >= self.window_s and not self.ended:
                if self._now() - self._late_s - self._waiting[0][0] >= self.window_s - 1e-6:
                    self._skip(time_s)
                    break
                self._changed.wait(self.step_s)
            if self._last_s is not None:
                passed = self._slot(time_s) - self._slot(self._last_s)
                self.skipped += max(0, min(self.stride, passed) - 1)
            self._last_s = time_s
            self._waiting.append((time_s, frame))
            self._changed.notify_all()

    def take(self, patience_s: float) -> tuple[float, np.ndarray] | None:
        """The oldest frame that waits; None if none came for so long, or if none will."""
        with self._changed:
            begun = self._now()
            if not self._waiting:
                self._hungry = True
                self._changed.wait_for(lambda: self._waiting or self.ended, patience_s)
                self._idle += self._now() - begun
                self._look_closer()
            if not self._waiting:
                return None
            found, self._hungry = self._waiting.popleft(), False
            self.lag_s = max(0.0, self._now() - self._late_s - found[0])
            self._changed.notify_all()
            return found

    def end(self) -> None:
        """No frame will come; what waits can be taken."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Drops what waits."""
        with self._changed:
            self._waiting.clear()

    def _slot(self, time_s: float, stride: int = 1) -> int:
        return floor(time_s / (self.step_s * stride) + 1e-6)

    def _span(self, time_s: float) -> float:
        return time_s - self._waiting[0][0] if self._waiting else 0.0

    def _skip(self, time_s: float) -> None:
        """Every second frame from now on, if two a window are left; else the oldest."""
        before = len(self._waiting)
        if 4 * self.stride * self.step_s <= self.window_s:
            self.stride *= 2
            kept = [each for each in self._waiting if self._slot(each[0]) % self.stride == 0]
            self._waiting = deque(kept)
            self._since, self._idle = self._now(), 0.0
        else:
            while self._span(time_s) >= 2 * self.window_s:
                self._waiting.popleft()
        self.skipped += before - len(self._waiting)

    def _look_closer(self) -> None:
        """Looks at twice as many frames, once there is time for them."""
        passed = self._now() - self._since
        if self.stride > 1 and passed >= self.window_s:
            if self._idle > IDLE * passed:
                self.stride //= 2
            self._since, self._idle = self._now(), 0.0
