"""Inputs are read ahead, by threads: before their model is loaded, beside the encoder, and while another one is answered.

A `Reading` is one of them: a thread makes chunks of it, frames or patches, and they wait until somebody takes them. `Readings`
share the memory for chunks that wait, and take turns. Imports no torch, so reading starts before torch is imported.

The chunks do not depend on timing: they are the same, in the same order, however far a reading is when somebody takes them.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from contextvars import Context, copy_context
from itertools import count
from typing import Any, Generic, Self, TypeVar

from evoprune.video.frames import probe
from evoprune.video.info import IMAGES, Video
from evoprune.video.plan import Plan
from evoprune.video.sandbox.isolation import Scope, Stopped, check_wanted, wait_for

T = TypeVar("T")

CHUNK_BYTES = 8 * 2**20  # of frames in a chunk, as decoded and once they are resized; two frames may be larger
TICK_S = 0.25  # how often a consumer that waits for a chunk reports that it waits
PATIENCE_S = 3.0  # how long closing waits for a thread that no worker process can be blamed for
MOST_PROBED = 256  # inputs whose metadata is remembered


class Readings:
    """Readings that share memory and take turns, in the order in which they were made. Closing ends all of them.

    Args:
        limit_bytes: Upper bound on the chunks that wait, of all readings together. Whoever takes chunks gets them even if there
            is no room.
        at_once: How many of them read at a time.
    """

    def __init__(self, limit_bytes: float = math.inf, at_once: int = 1):
        self.limit_bytes = limit_bytes
        self.at_once = at_once
        self.held_bytes = 0
        self.unfinished: list[Reading] = []
        self.changed = threading.Condition()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readings that have not finished."""
        stop_all(self.unfinished)


class Reading(Generic[T]):
    """An input that a thread reads from the moment this is made. To be closed.

    Args:
        source: Called by the thread once it is its turn; returns the iterator that makes the chunks.
        group: The readings that this one shares memory and turns with.
        shared: Keep chunks that were taken, so that several threads can take them, also again; and read on when the thread that
            makes this is stopped. Otherwise the reading stops, too.
        drop: Called with each chunk that nobody takes.

    Attributes:
        frames: Lower bound on the number of frames read so far.
        chunk_bytes: The size of the largest chunk; `source` may set it beforehand.
        hidden_s: Seconds of making chunks that whoever takes them did not wait for.
        begun: True once `source` has returned.
        ended: True once the thread has finished, for whatever reason.
        complete: True if the thread has made all chunks.
        taken: True once somebody takes chunks.
    """

    def __init__(
        self,
        source: Callable[["Reading[T]"], Iterator[T]],
        group: Readings | None = None,
        *,
        shared: bool = False,
        drop: Callable[[T], None] = lambda chunk: None,
    ):
        self.frames = 0
        self.chunk_bytes = 0
        self.hidden_s = 0.0
        self.begun = self.ended = self.complete = self.taken = False
        self.problem: BaseException | None = None  # that ended the thread
        self._source = source
        self._group = group or Readings()
        self._changed = self._group.changed
        self._shared = shared
        self._drop = drop
        self._chunks: list[T | None] = []  # None for those that were taken, unless it is shared
        self._seconds: list[float] = []  # that each chunk took
        self._next = 0  # the chunk that is taken next
        self._closed = False
        self._pid = os.getpid()
        self._scope = Scope()
        context = Context() if shared else copy_context()  # whose scope stops this thread, too
        # A daemon thread that hangs does not keep the program from ending.
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="evoprune-reading", daemon=True)
        with self._changed:
            self._group.unfinished.append(self)
        try:
            self._thread.start()
        except RuntimeError as problem:  # there are too many threads
            self._end(problem)

    @property
    def is_here(self) -> bool:
        """False in a forked copy of the process, which lacks the thread."""
        return self._pid == os.getpid()

    def at_least(self, frames: int) -> None:
        """Note that so many frames were read."""
        self.frames = max(self.frames, frames)

    def chunks(self, waiting: Callable[[], None] = lambda: None) -> Iterator[T]:
        """Yield all chunks, as soon as they are there, then raise whatever ended the thread before it was done.

        `waiting`: called now and then while this waits for a chunk. Raises Stopped if the reading was closed, or nobody wants any
        more what the calling thread reads.
        """
        for number in count():
            start = time.perf_counter()
            while not self._is_made(number):
                waiting()
                check_wanted()
            chunk = self._take(number)
            if chunk is None:
                return
            waited_s = time.perf_counter() - start
            self.hidden_s += max(0.0, self._seconds[number] - waited_s)
            yield chunk
            del chunk  # so that only the caller holds it

    def wait(self) -> None:
        """Wait until the thread has finished, or waits for somebody to take chunks. Raises Stopped."""
        with self._changed:
            wait_for(self._changed, lambda: self.ended or (self.begun and not self._has_room()))

    def close(self) -> None:
        """Drop all chunks, and stop the thread: at once if it reads in a worker process.

        A thread that hangs elsewhere for longer than `PATIENCE_S` is left to end by itself.
        """
        stop_all([self])

    # For `Readings`, and the thread.

    def stop(self) -> None:
        """Close, without waiting for the thread."""
        with self._changed:
            self._closed = True
            left = [chunk for chunk in self._chunks if chunk is not None]
            self._group.held_bytes -= sum(map(size_of, left))
            self._chunks = [None] * len(self._chunks)
            self._changed.notify_all()
        for chunk in left:
            self._drop(chunk)
        self._scope.stop()

    def join(self) -> None:
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE_S)
        self.problem = None  # whose traceback refers to this object

    def _work(self) -> None:
        self._scope.enter()
        problem = None
        try:
            with self._changed:
                wait_for(self._changed, self._has_turn)
            check_wanted()
            with closing(self._source(self)) as chunks:
                with self._changed:
                    self.begun = True
                    self._changed.notify_all()
                while True:
                    with self._changed:
                        wait_for(self._changed, self._has_room)
                    check_wanted()
                    start = time.perf_counter()
                    chunk = next(chunks, None)
                    if chunk is None:
                        self.complete = True
                        break
                    self._hold(chunk, time.perf_counter() - start)
                    del chunk  # so that only whoever takes it holds it
        except BaseException as error:
            problem = error
        self._end(problem)

    def _end(self, problem: BaseException | None) -> None:
        with self._changed:
            self.problem = problem
            self.ended = True
            self._group.unfinished.remove(self)
            self._changed.notify_all()

    def _has_turn(self) -> bool:
        return self._group.unfinished.index(self) < self._group.at_once

    def _has_room(self) -> bool:
        """Return True if there is room for the next chunk, and the one that the reader makes meanwhile; or somebody needs it."""
        fits = self._group.held_bytes + 2 * self.chunk_bytes <= self._group.limit_bytes
        return fits or (self.taken and self._next == len(self._chunks))

    def _hold(self, chunk: T, seconds: float) -> None:
        with self._changed:
            closed = self._closed
            if not closed:
                self._chunks.append(chunk)
                self._seconds.append(seconds)
                self._group.held_bytes += size_of(chunk)
                self.chunk_bytes = max(self.chunk_bytes, size_of(chunk))
                self._changed.notify_all()
        if closed:
            self._drop(chunk)

    def _is_made(self, number: int) -> bool:
        """Wait for a chunk, for a short while; True if it is there, or will never be."""
        with self._changed:
            self.taken = True
            self._next = max(self._next, number)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: len(self._chunks) > number or self.ended or self._closed, TICK_S)

    def _take(self, number: int) -> T | None:
        """Return a chunk; None after the last one. Raises what ended the thread, and Stopped."""
        with self._changed:
            if self._closed:
                raise Stopped
            if len(self._chunks) > number:
                chunk = self._chunks[number]
                self._next = number + 1
                if not self._shared:
                    self._chunks[number] = None
                    self._group.held_bytes -= size_of(chunk)
                self._changed.notify_all()
                return chunk
            if self.problem is not None:
                raise self.problem
            return None


def stop_all(readings: list[Reading]) -> None:
    """Close several readings. In a forked copy of the process, which lacks their threads, this does nothing."""
    readings = [reading for reading in readings if reading.is_here]
    for reading in readings:
        reading.stop()
    for reading in readings:
        reading.join()


def chunk_bytes(plan: Plan) -> int:
    """Return the bytes of frames, as decoded, that a chunk holds."""
    pixels = plan.source.width * plan.source.height
    return CHUNK_BYTES * pixels // max(pixels, plan.width * plan.height)


def size_of(chunk: Any) -> int:
    """Return the bytes of a chunk; 0 for anything else that a thread prepares."""
    return getattr(chunk, "nbytes", 0)


# What is known of files.

_probed: dict[tuple[str, float], tuple[tuple, Video]] = {}  # the state of the files, and their metadata
_probed_lock = threading.Lock()


def probed(path: str | os.PathLike[str], *, folder_fps: float) -> Video:
    """Return the metadata of an input, as `frames.probe`. The same files are probed again only if they have changed."""
    key = os.fspath(path), folder_fps
    state = state_of(key[0])
    before, info = _probed.get(key, (None, None))
    if info is None or state is None or before != state:
        info = probe(path, folder_fps=folder_fps)
        with _probed_lock:
            _probed.pop(key, None)
            _probed[key] = state, info
            if len(_probed) > MOST_PROBED:
                del _probed[next(iter(_probed))]
    return info


def state_of(path: str) -> tuple | None:
    """Return what changes when a file, or an image in a folder, is replaced or written to; None if it cannot be found.

    The time of the last change of a file's entry (ctime) also reveals a file whose size and time were set back.
    """
    try:
        if not os.path.isdir(path):
            return _facts("", os.stat(path))
        with os.scandir(path) as entries:
            images = [entry for entry in entries if entry.name.lower().endswith(IMAGES)]
        return tuple(sorted(_facts(entry.name, entry.stat()) for entry in images))
    except (OSError, ValueError):
        return None


def _facts(name: str, status: os.stat_result) -> tuple:
    return name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
