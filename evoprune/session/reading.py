"""Read inputs ahead in background threads: while the model loads, while the encoder runs, or while another question is answered.

A `Reading` is an input that is being read. Its thread produces chunks of frames or patches, which are buffered until a consumer
takes them. The readings in a `Readings` group take turns and share a memory limit for buffered chunks. This module does not import
torch, so reading can start before torch is imported.

Timing does not affect the result: however far ahead the thread is, a consumer gets the same chunks in the same order.
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

from evoprune.video import Folder, HeldVideo, Scope, Stopped, Video, probe

T = TypeVar("T")

TICK_S = 0.25  # seconds between calls of a consumer's `waiting` function
PATIENCE_S = 3.0  # maximum time in seconds that closing waits for a thread
MOST_PROBED = 256  # maximum number of inputs whose metadata is cached in memory


class Readings:
    """A group of readings that take turns, in order of creation, and share a memory limit. Closing the group stops them all.

    Args:
        limit_bytes: Maximum total size of the chunks buffered in all readings, in bytes. The limit does not apply to a chunk that a
            consumer is already waiting for.
        at_once: Number of readings that may read at the same time.
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
        """Stop all readings in the group that have not finished."""
        stop_all(self.unfinished)


class Reading(Generic[T]):
    """An input that a background thread reads ahead as soon as it is its turn. Close it after use.

    Args:
        source: Called in the thread when it is its turn. Returns an iterator that produces the chunks.
        group: The group with which this reading takes turns and shares a memory limit. The default is a new group without a limit.
        shared: Whether to keep chunks after they are taken, so that several consumers can each get all of them. A shared reading
            also continues if the thread that created it is stopped, whereas any other reading would stop with it.
        size: Total size of the chunks in bytes, if it is known in advance.
        drop: Called for each chunk that has not been taken when the reading is closed.

    Attributes:
        frames: Lower bound on the number of frames that have been read.
        chunk_bytes: Size of the largest chunk in bytes. `source` may set it in advance.
        hidden_s: Read time that the consumer did not have to wait for, in seconds.
        begun: True once `source` has returned.
        ended: True once the thread has finished, failed, or been stopped.
        complete: True once the thread has produced all chunks.
        taken: True once a consumer has asked for a chunk.
        users: Number of inputs that are using a shared reading, maintained by the owner of the reading.
        problem: The exception with which the thread failed, or None.
    """

    def __init__(
        self,
        source: Callable[["Reading[T]"], Iterator[T]],
        group: Readings | None = None,
        *,
        shared: bool = False,
        size: int = 0,
        drop: Callable[[T], None] = lambda chunk: None,
    ):
        self.size = size
        self.users = 0
        self.frames = 0
        self.chunk_bytes = 0
        self.hidden_s = 0.0
        self.begun = self.ended = self.complete = self.taken = False
        self.problem: BaseException | None = None
        self._source = source
        self._group = group or Readings()
        self._changed = self._group.changed
        self._shared = shared
        self._drop = drop
        # The chunks produced so far. Unless the reading is shared, a chunk is replaced with None once it has been taken.
        self._chunks: list[T | None] = []
        self._seconds: list[float] = []  # time that it took to produce each chunk
        self._next = 0  # index of the next chunk to take
        self._closed = False
        self._pid = os.getpid()
        self._scope = Scope()
        # With a copy of the context, stopping the current thread's scope also stops this thread.
        context = Context() if shared else copy_context()
        # Use a daemon thread, so that a hanging read cannot keep the program from exiting.
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="evoprune-reading", daemon=True)
        with self._changed:
            self._group.unfinished.append(self)
        try:
            self._thread.start()
        except RuntimeError as problem:  # the operating system could not start another thread
            self._end(problem)

    @property
    def is_here(self) -> bool:
        """Whether the thread exists in this process, which is False in a forked child process."""
        return self._pid == os.getpid()

    def at_least(self, frames: int) -> None:
        """Raise the frame count `frames` to this number, unless it is already higher."""
        self.frames = max(self.frames, frames)

    def chunks(self, waiting: Callable[[], None] = lambda: None) -> Iterator[T]:
        """Yield all chunks in order, as soon as they are available. If the thread failed, raise its exception after the last one.

        Args:
            waiting: Called every `TICK_S` seconds while the consumer waits for a chunk.

        Raises:
            Stopped: If the reading was closed, or if the consumer's own thread is stopped.
        """
        for number in count():
            start = time.perf_counter()
            while not self._is_made(number):
                waiting()
                Scope.check()
            chunk = self._take(number)
            if chunk is None:
                return
            waited_s = time.perf_counter() - start
            self.hidden_s += max(0.0, self._seconds[number] - waited_s)
            yield chunk
            del chunk  # drop this reference, so that the consumer can free the memory

    def wait(self) -> None:
        """Wait until the thread has finished, or has filled the buffer.

        Raises:
            Stopped: If the calling thread is stopped.
        """
        with self._changed:
            Scope.wait_for(self._changed, lambda: self.ended or (self.begun and not self._has_room()))

    def close(self) -> None:
        """Discard all chunks and stop the thread.

        A thread that is waiting for a worker process stops immediately. If the thread hangs anywhere else, this method returns
        after `PATIENCE_S` seconds and leaves the thread running.
        """
        stop_all([self])

    # Used by `Readings`.

    def stop(self) -> None:
        """Discard all chunks and tell the thread to stop, without waiting for it."""
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
        self.problem = None  # breaks a reference cycle that includes the traceback

    # Used by the thread.

    def _work(self) -> None:
        self._scope.enter()
        problem = None
        try:
            with self._changed:
                Scope.wait_for(self._changed, self._has_turn)
            Scope.check()
            with closing(self._source(self)) as chunks:
                with self._changed:
                    self.begun = True
                    self._changed.notify_all()
                while True:
                    with self._changed:
                        Scope.wait_for(self._changed, self._has_room)
                    Scope.check()
                    start = time.perf_counter()
                    chunk = next(chunks, None)
                    if chunk is None:
                        self.complete = True
                        break
                    self._hold(chunk, time.perf_counter() - start)
                    del chunk
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
        """Return True if the buffer has room for two more chunks, or if a consumer is waiting for the next chunk."""
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
        """Wait up to `TICK_S` seconds for a chunk. Return True if the chunk is available, or the thread has ended without it."""
        with self._changed:
            self.taken = True
            self._next = max(self._next, number)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: len(self._chunks) > number or self.ended or self._closed, TICK_S)

    def _take(self, number: int) -> T | None:
        """Return the chunk with the given number, or None after the last chunk.

        Raises:
            Stopped: If the reading was closed.
            BaseException: After the last chunk, the exception with which the thread failed, if any.
        """
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
    """Close several readings. In a forked child process, this is a no-op, because the threads do not exist there."""
    readings = [reading for reading in readings if reading.is_here]
    for reading in readings:
        reading.stop()
    for reading in readings:
        reading.join()


def size_of(chunk: Any) -> int:
    """Return the size of a chunk of frames or patches in bytes. For other objects, such as opened inputs, return 0."""
    return getattr(chunk, "nbytes", 0)


# Metadata and states of files.

# Maps a path and folder_fps to the file's state and metadata.
_probed: dict[tuple[str, float], tuple[tuple | None, Video]] = {}
_probed_lock = threading.Lock()


def probed(path: str | os.PathLike[str] | HeldVideo, *, folder_fps: float) -> Video:
    """Return the metadata of an input (see `frames.probe`), which is cached until the file changes."""
    if isinstance(path, HeldVideo):
        return path
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
    """Return a value that changes whenever a file, or an image in a folder of frames, is modified or replaced.

    The value includes the ctime, which changes even if the size and mtime of a modified file are restored. Returns None if there is
    no such file.
    """
    try:
        if not os.path.isdir(path):
            return _facts("", os.stat(path))
        with os.scandir(path) as entries:
            images = [entry for entry in entries if entry.name.lower().endswith(Folder.IMAGES)]
        return tuple(sorted(_facts(entry.name, entry.stat()) for entry in images))
    except (OSError, ValueError):
        return None


def _facts(name: str, status: os.stat_result) -> tuple:
    return name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
