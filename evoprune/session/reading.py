"""Read inputs ahead in background threads while the model loads, the encoder runs, or another question is being answered.

A `Reading` represents an input being read. Its thread produces chunks of frames or patches, which are buffered until a consumer
takes them. Each `Reading` in a `ReadingGroup` waits for its turn, and all of them share a memory limit for buffered chunks. This
module does not import torch, so reading can start before torch is imported.

Timing doesn't affect the result: no matter how far ahead the thread is, a consumer gets the same chunks in the same order.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import closing
from contextvars import Context, copy_context
from enum import Enum, auto
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from evoprune.files import FileIdentity
from evoprune.timeline import Timeline
from evoprune.video import Folder, Scope, Stopped, Video, probe

if TYPE_CHECKING:
    from evoprune.video import HeldVideo

T = TypeVar("T")
Item = TypeVar("Item")

TICK_S = 0.25  # interval between calls to a consumer's `waiting` function, in seconds
PATIENCE_S = 3.0  # maximum time to wait for a thread when closing, in seconds
MOST_PROBED = 256  # maximum number of inputs with metadata cached in memory


class ReadingGroup:
    """A group of `Reading` objects that take turns, in creation order, and share a memory limit. Closing the group stops them all.

    Args:
        limit_bytes: Maximum total size of all buffered chunks in the group, in bytes. The limit doesn't apply to a chunk that a
            consumer is already waiting for.
        at_once: Maximum number of inputs to read at the same time.
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
        """Stop all unfinished `Reading` objects in the group."""
        stop_all(self.unfinished)


class State(Enum):
    """The state of a `Reading`."""

    WAITING = auto()  # for its turn
    READING = auto()
    COMPLETE = auto()  # the thread has produced all chunks
    FAILED = auto()
    CLOSED = auto()


class Reading(Generic[T]):
    """An input that a background thread reads ahead as soon as its turn comes. Close it after use.

    Args:
        source: Called in the thread when its turn comes. Returns an iterator that produces the chunks. None starts no thread; see
            `finished`.
        group: The group in which to take turns and share a memory limit. The default is a new group without a limit.
        shared: Whether to keep chunks after they are taken, so that multiple consumers can each get all chunks. A shared `Reading`
            also continues if the thread that created it is stopped, whereas an unshared `Reading` stops along with that thread.
        drop: Called for each remaining chunk on close.

    Attributes:
        state: The current state.
        timeline: The intervals in which the thread worked, recorded by `source`.
        frames: Lower bound on the number of frames read so far.
        chunk_bytes: Size of the largest chunk in bytes. `source` may set it in advance.
        taken: True once a consumer has requested a chunk.
        problem: The exception raised in the thread, or None.
    """

    def __init__(
        self,
        source: Callable[["Reading[T]"], Iterator[T]] | None,
        group: ReadingGroup | None = None,
        *,
        shared: bool = False,
        drop: Callable[[T], None] = lambda chunk: None,
    ):
        self.state = State.WAITING
        self.timeline = Timeline()
        self.frames = 0
        self.chunk_bytes = 0
        self.taken = False
        self.problem: BaseException | None = None
        self._group = group or ReadingGroup()
        self._changed = self._group.changed
        self._shared = shared
        self._drop = drop
        # The chunks produced so far. Unless chunks are shared, each chunk is replaced with None once it has been taken.
        self._chunks: list[T | None] = []
        self._next = 0  # index of the next chunk to take
        self._pid = os.getpid()
        self._scope = Scope()
        self._thread: threading.Thread | None = None
        if source is not None:
            self._start(source)

    @classmethod
    def finished(cls, chunks: Iterable[T]) -> "Reading[T]":
        """Return a complete `Reading` of existing chunks, which any number of consumers can get."""
        reading = cls(None, shared=True)
        reading._chunks = [*chunks]
        reading._group.held_bytes = sum(map(size_of, reading._chunks))
        reading.state = State.COMPLETE
        return reading

    def _start(self, source: Callable[["Reading[T]"], Iterator[T]]) -> None:
        # With a copy of the context, stopping the current thread's scope also stops the new thread.
        context = Context() if self._shared else copy_context()
        # Only the thread refers to `source`, so whatever `source` refers to can be freed as soon as the thread ends, even if
        # the chunks are kept. Use a daemon thread, so a hanging read cannot prevent the program from exiting.
        work = (self._work, source)
        self._thread = threading.Thread(target=context.run, args=work, name="evoprune-reading", daemon=True)
        with self._changed:
            self._group.unfinished.append(self)
        try:
            self._thread.start()
        except RuntimeError as problem:  # the operating system couldn't start another thread
            self._end(problem)

    @property
    def is_here(self) -> bool:
        """Whether the thread exists in this process, which is False in a forked child process."""
        return self._pid == os.getpid()

    @property
    def has_started(self) -> bool:
        """Whether the thread has begun to read, even if it has ended in the meantime."""
        return self.state is not State.WAITING

    @property
    def is_complete(self) -> bool:
        return self.state is State.COMPLETE

    @property
    def has_ended(self) -> bool:
        return self.state in (State.COMPLETE, State.FAILED, State.CLOSED)

    def at_least(self, frames: int) -> None:
        """Raise the frame count to `frames`, unless it is already higher."""
        self.frames = max(self.frames, frames)

    def chunks(self, waiting: Callable[[], None] = lambda: None) -> Iterator[T]:
        """Yield all chunks in order as they become available. If the thread failed, raise its exception after the last chunk.

        Args:
            waiting: Called every `TICK_S` seconds while the consumer waits for a chunk.

        Raises:
            Stopped: If the `Reading` was closed, or the consumer's own thread is stopped.
        """
        for number in count():
            while not self._is_made(number):
                waiting()
                Scope.check()
            chunk = self._take(number)
            if chunk is None:
                return
            yield chunk
            del chunk  # drop this reference, so that the consumer can free the memory

    def wait(self) -> None:
        """Wait until the thread has finished or filled the buffer.

        Raises:
            Stopped: If the calling thread is stopped.
        """
        with self._changed:
            Scope.wait_for(self._changed, lambda: self.has_ended or (self.has_started and not self._has_room()))

    def close(self) -> None:
        """Discard all chunks and stop the thread.

        A thread waiting for a worker process stops immediately. If the thread hangs anywhere else, this method returns after
        `PATIENCE_S` seconds and leaves the thread running.
        """
        stop_all([self])

    # Used by `ReadingGroup`.

    def stop(self) -> None:
        """Discard all chunks and tell the thread to stop, without waiting for it."""
        with self._changed:
            self.state = State.CLOSED
            left = [chunk for chunk in self._chunks if chunk is not None]
            self._group.held_bytes -= sum(map(size_of, left))
            self._chunks = [None] * len(self._chunks)
            self._changed.notify_all()
        for chunk in left:
            self._drop(chunk)
        self._scope.stop()

    def join(self) -> None:
        if self._thread and self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE_S)
        self.problem = None  # breaks a reference cycle that includes the traceback

    # Used by the thread.

    def _work(self, source: Callable[["Reading[T]"], Iterator[T]]) -> None:
        self._scope.enter()
        problem = None
        try:
            with self._changed:
                Scope.wait_for(self._changed, self._has_turn)
            Scope.check()
            with closing(source(self)) as chunks:
                self._becomes(State.READING)
                while True:
                    with self._changed:
                        Scope.wait_for(self._changed, self._has_room)
                    Scope.check()
                    chunk = next(chunks, None)
                    if chunk is None:
                        break
                    self._hold(chunk)
                    del chunk
        except BaseException as error:
            problem = error
        self._end(problem)

    def _end(self, problem: BaseException | None) -> None:
        with self._changed:
            self.problem = problem
            self._group.unfinished.remove(self)
            self._becomes(State.COMPLETE if problem is None else State.FAILED)

    def _becomes(self, state: State) -> None:
        """Change the state, unless the `Reading` has been closed."""
        with self._changed:
            if self.state is not State.CLOSED:
                self.state = state
            self._changed.notify_all()

    def _has_turn(self) -> bool:
        return self._group.unfinished.index(self) < self._group.at_once

    def _has_room(self) -> bool:
        """Return True if the buffer has room for two more chunks, or a consumer is waiting for the next chunk."""
        fits = self._group.held_bytes + 2 * self.chunk_bytes <= self._group.limit_bytes
        return fits or (self.taken and self._next == len(self._chunks))

    def _hold(self, chunk: T) -> None:
        with self._changed:
            closed = self.state is State.CLOSED
            if not closed:
                self._chunks.append(chunk)
                self._group.held_bytes += size_of(chunk)
                self.chunk_bytes = max(self.chunk_bytes, size_of(chunk))
                self._changed.notify_all()
        if closed:
            self._drop(chunk)

    def _is_made(self, number: int) -> bool:
        """Wait up to `TICK_S` seconds for a chunk. Return True if it is available, or the thread has ended without producing it."""
        with self._changed:
            self.taken = True
            self._next = max(self._next, number)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: len(self._chunks) > number or self.has_ended, TICK_S)

    def _take(self, number: int) -> T | None:
        """Return the chunk with the given number, or None after the last chunk.

        Raises:
            Stopped: If the `Reading` was closed.
            BaseException: After the last chunk, any exception raised in the thread.
        """
        with self._changed:
            if self.state is State.CLOSED:
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


class Prefetcher(ReadingGroup, Generic[Item, T]):
    """A group that reads the items of an iterable ahead, in order. Close it after use.

    The items are consumed lazily, so there may be any number of them.

    Args:
        items: The items, such as paths.
        read: Called in a background thread when an item's turn comes, with the item and its `Reading`. Returns an iterator that
            produces the chunks: frames while the model is being loaded, and opened inputs, which contain patches, later on.
        most: Maximum number of items in `queue`.
        drop: See `Reading`.
        limit_bytes, at_once: See `ReadingGroup`.

    Attributes:
        queue: The items being read or waiting for it, each with its `Reading`. Consumers remove the items that they take.
    """

    def __init__(
        self,
        items: Iterable[Item],
        read: Callable[[Item, Reading[T]], Iterator[T]],
        *,
        most: float = math.inf,
        drop: Callable[[T], None] = lambda chunk: None,
        limit_bytes: float = math.inf,
        at_once: int = 1,
    ):
        super().__init__(limit_bytes, at_once)
        self.queue: deque[tuple[Item, Reading[T]]] = deque()
        self._items = iter(items)
        self._read = read
        self._most = most
        self._drop = drop
        self._problem: Exception | None = None  # raised by `items`

    def fill(self) -> None:
        """Start reading the next items, until the queue is full or no items are left.

        Raises:
            Exception: Any exception raised by `items`, once the queue is empty.
        """
        while self._problem is None and len(self.queue) < self._most:
            try:
                item = next(self._items)
            except StopIteration:
                break
            except Exception as problem:
                self._problem = problem
                break
            self.queue.append((item, Reading(partial(self._read, item), self, drop=self._drop)))
        if self._problem is not None and not self.queue:
            raise self._problem

    def close(self) -> None:
        """Stop reading, and discard everything in the queue."""
        stop_all([*(reading for _, reading in self.queue), *self.unfinished])
        self.queue.clear()
        self._problem = None  # breaks a reference cycle that includes the traceback


class SharedChunks(Generic[T]):
    """Chunks shared by several users, as kept by a store: data, and the `Reading` that produces them until it is complete.

    The store's lock protects the methods, except `read` and `stop`.

    Args:
        key: The key in the store.
        source, group: See `Reading`.
        size: Total size of the chunks in bytes, if known in advance.

    Attributes:
        users: Number of users that have not released the chunks yet.
    """

    def __init__(
        self,
        key: Hashable,
        source: Callable[[Reading[T]], Iterator[T]],
        group: ReadingGroup | None = None,
        *,
        size: int = 0,
    ):
        self.key = key
        self.size = size
        self.users = 0
        self._reading: Reading[T] | None = Reading(source, group, shared=True)
        self._chunks: tuple[T, ...] = ()  # set once the `Reading` is complete

    @property
    def is_complete(self) -> bool:
        return self._reading is None

    def acquire(self) -> bool:
        """Add a user, who must call `release`. Return False if nobody can use the chunks any more.

        This is the case after a failure, and in a forked process while the thread has not finished.
        """
        reading = self._reading
        usable = reading is None or reading.is_complete or (reading.is_here and not reading.has_ended)
        self.users += usable
        return usable

    def read(self) -> Reading[T]:
        """Return a `Reading` of the chunks, which may already be complete. Users must not close it."""
        return self._reading or Reading.finished(self._chunks)

    def release(self) -> bool:
        """Remove a user. Return True if it was the last one."""
        self.users -= 1
        if self._reading is not None and self._reading.is_complete:
            self._chunks = tuple(self._reading.chunks())
            self._reading = None
        return not self.users

    def stop(self) -> None:
        """Stop the thread that produces the chunks, unless it has finished."""
        if self._reading is not None:
            self._reading.close()


def stop_all(readings: list[Reading]) -> None:
    """Close multiple `Reading` objects. This is a no-op in a forked child process, where the threads don't exist."""
    readings = [reading for reading in readings if reading.is_here]
    for reading in readings:
        reading.stop()
    for reading in readings:
        reading.join()


def size_of(chunk: Any) -> int:
    """Return the size of a chunk of frames or patches in bytes, or 0 for other objects, such as opened inputs."""
    return getattr(chunk, "nbytes", 0)


# File metadata and state.

# Maps a path and folder_fps to the file's state and metadata.
_probed: dict[tuple[str, float], tuple[tuple | None, Video]] = {}
_probed_lock = threading.Lock()


def probed(path: "str | os.PathLike[str] | HeldVideo", *, folder_fps: float) -> Video:
    """Return an input's metadata (see `frames.probe`), which is cached until the file changes."""
    if isinstance(path, Video):  # an array of frames
        return path
    if Folder.is_at(path):  # probed quickly unless it changed, whereas checking the state of every image takes long
        return probe(path, folder_fps=folder_fps)
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

    Returns None if the file doesn't exist.
    """
    try:
        return states_of(Folder.images_in(path) if Folder.is_at(path) else [path])
    except (OSError, ValueError):
        return None


def states_of(paths: Iterable[str]) -> tuple:
    """Return the identity of each file (see `FileIdentity`).

    Raises:
        OSError: If a file is missing.
        ValueError: If a path contains a null byte.
    """
    return tuple(map(FileIdentity.of, paths))
