"""Frames become patches, in a thread: some chunks ahead of the encoder, or all of an input.

All are kept in memory, so that other settings encode the same input without reading it again. They are uint8: 116 MB for the 24,576
units that an input has at most by default (151 MB in Qwen3-VL). They stay on the device that made them.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import closing
from contextvars import Context, copy_context
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from evoprune.backend.devices import available_memory, empty_cache
from evoprune.model.cost import Clock
from evoprune.video.frames import FrameChunk
from evoprune.video.info import ARRAY, IMAGES, NOTHING_SAID, files
from evoprune.video.plan import InputLimits, Plan
from evoprune.video.sandbox.isolation import Scope, wait_for
from evoprune.vision.preprocess import patches_of

T = TypeVar("T")

LIMIT_BYTES = 2**29  # of one input, and of all that nobody uses
TICK_S = 0.25  # how often whoever waits for a piece says so
SHARE = 4  # those in use take at most one part in so many of the memory that is available
PATIENCE_S = 3.0  # how long closing waits for the piece that is being made, where that is no frame of a worker process


class Count:
    """How many frames of an input were read so far, at least."""

    def __init__(self):
        self.frames = 0

    def at_least(self, frames: int) -> None:
        """Is called by the thread that reads."""
        self.frames = max(self.frames, frames)


def cut_frames(
    frames: Callable[[], Iterator[FrameChunk]],
    plan: Plan,
    limits: InputLimits,
    device: torch.device,
    clock: Clock,
    count: Count,
) -> Generator[FrameChunk, None, None]:
    """Yield the chunks that `frames` reads as patches on `device`. Adds up the seconds of "read" and "preprocess" in `clock`."""
    with closing(frames()) as chunks:
        for chunk in clock.each("read", chunks):
            count.at_least(chunk.end)
            clock.seconds["read"] += chunk.hidden_s
            with clock.stage("preprocess"):
                patches = patches_of(chunk.pixels, plan, limits, device)
            yield replace(chunk, pixels=patches)


def prefetched(
    items: Generator[T, None, None], depth: int = 2, waiting: Callable[[], None] = lambda: None
) -> Iterator[T]:
    """Yields items in order while a thread makes the next ones, at most `depth` of them. `waiting`: called now and then meanwhile.

    The thread, which also closes `items`, starts with the first item that is asked for. When this iterator is exhausted, is closed
    or raises, the thread ends: what it reads in a worker process is stopped at once, anything else that it is making is finished,
    unless that takes longer than `PATIENCE_S`; then it is left to end by itself. Whatever making an item raises comes after all
    items before it.
    """
    queue: SimpleQueue[tuple[list[T], BaseException | None]] = SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()
    scope = Scope()

    def work() -> None:
        problem = None
        scope.enter()
        try:
            with closing(items):
                while room.acquire() and not stopped.is_set():
                    queue.put(([next(items)], None))
        except StopIteration:
            pass
        except BaseException as error:
            problem = error
        queue.put(([], problem))

    # A daemon thread that hangs does not keep the program from ending.
    run = copy_context().run  # so that whatever stops this thread also stops the one that it starts
    thread = threading.Thread(target=run, args=(work,), name="evoprune-prefetch", daemon=True)
    try:
        thread.start()
        while True:
            try:
                item, problem = queue.get(timeout=TICK_S)
            except Empty:
                waiting()
                continue
            if problem is not None:
                raise problem
            if not item:
                return
            room.release()
            yield item.pop()
    finally:
        stopped.set()
        room.release()
        if thread.is_alive():
            scope.stop()
            thread.join(PATIENCE_S)


class KeptPatches:
    """All pieces of one input, which a thread makes, and the `count` of the frames it reads. `PatchStore` opens and closes it."""

    def __init__(self, pieces: Generator[FrameChunk, None, None], size: int, count: Count):
        self.bytes = size
        self.count = count
        self.users = 0
        self.complete = False
        self._made: list[FrameChunk] = []
        self._problem: BaseException | None = None
        self._ended = self._stopped = False
        self._changed = threading.Condition()
        self._scope = Scope()
        # Not in the scope of whoever is the first to want the patches: only the last one stops the thread.
        run = Context().run
        # A daemon thread that hangs does not keep the program from ending.
        self._thread = threading.Thread(target=run, args=(self._make, pieces), name="evoprune-prefetch", daemon=True)
        self._thread.start()

    def pieces(self, waiting: Callable[[], None] = lambda: None) -> Iterator[FrameChunk]:
        """Yields all pieces, also while more are made. `waiting`: called now and then meanwhile.

        Raises whatever making a piece has raised, after the pieces before it.
        """
        taken = 0
        while True:
            piece = None
            with self._changed:
                if len(self._made) == taken and not self._ended:
                    self._changed.wait(TICK_S)
                if len(self._made) > taken:
                    piece = self._made[taken]
                elif self._problem is not None:
                    raise self._problem
                elif self._ended:
                    return
            if piece is None:
                waiting()
            else:
                taken += 1
                yield piece

    def wait(self) -> None:
        """Waits until nothing more is made. Raises Stopped where nobody wants any more what this thread reads."""
        with self._changed:
            wait_for(self._changed, lambda: self._ended)

    def stop(self) -> None:
        """Ends the thread: at once where it reads in a worker process, else after the piece that it is making.

        One that takes longer than `PATIENCE_S` is left to end by itself.
        """
        self._stopped = True
        self._scope.stop()
        self._thread.join(PATIENCE_S)
        self._problem = None  # whose traceback refers to this object

    def _make(self, pieces: Generator[FrameChunk, None, None]) -> None:
        self._scope.enter()
        try:
            with closing(pieces):
                for piece in pieces:
                    with self._changed:
                        self._made.append(piece)
                        self._changed.notify_all()
                    if self._stopped:
                        break
                else:
                    self.complete = True
        except BaseException as problem:
            self._problem = problem
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class PatchStore:
    """The patches of the latest inputs of a model, by `content_key`. Threads may share it.

    What nobody uses takes at most `limit_bytes`; the least recently used is dropped first. An input that is larger is not kept, and
    nothing is where memory is short. 0 keeps nothing.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES):
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[Hashable, KeptPatches] = OrderedDict()
        self._lock = threading.Lock()

    def open(
        self,
        key: Hashable,
        size: int,
        device: torch.device,
        pieces: Callable[[], Generator[FrameChunk, None, None]],
        count: Count,
    ) -> KeptPatches | None:
        """Return the patches of this key, which are there or being read, or which `pieces` reads from now on; to be closed.

        `count`: of the frames that `pieces` reads.

        None where they cannot be kept: they are too large, or memory on `device` is short. `size`: their bytes.
        """
        with self._lock:
            if key not in self._entries:
                if size > self.limit_bytes:
                    return None
                available = available_memory(str(device))
                used = sum(each.bytes for each in self._used)
                if available is not None and SHARE * (used + size) > available:
                    self._drop_unused(0)
                    return None
                self._entries[key] = KeptPatches(pieces(), size, count)
            kept = self._entries[key]
            kept.users += 1
            return kept

    def close(self, key: Hashable, kept: KeptPatches) -> None:
        """Counts one user less. What nobody uses is kept if it is complete; else its thread ends."""
        with self._lock:
            kept.users -= 1
            if kept.users:
                return
            if kept.complete:
                self._entries.move_to_end(key)
                self._drop_unused(self.limit_bytes)
            else:
                del self._entries[key]
        if not kept.complete:
            kept.stop()

    def clear(self) -> bool:
        """Frees what nobody uses; whether there was anything."""
        with self._lock:
            freed = self._drop_unused(0)
        if freed:
            empty_cache()
        return freed

    @property
    def _used(self) -> list[KeptPatches]:
        return [kept for kept in self._entries.values() if kept.users]

    def _drop_unused(self, limit_bytes: int) -> bool:
        """Drops the least recently used beyond a limit; whether there were any."""
        unused = [(key, kept) for key, kept in self._entries.items() if not kept.users]
        total = sum(kept.bytes for _, kept in unused)
        dropped = False
        for key, kept in unused:
            if total > limit_bytes or not limit_bytes:
                del self._entries[key]
                total -= kept.bytes
                dropped = True
        return dropped


def patch_bytes(plan: Plan, limits: InputLimits) -> int:
    """Bytes of all patches of an input: those of its pixels as the encoder reads them, in three colours."""
    count, height, width = plan.grid
    return count * height * width * limits.unit**2 * limits.temporal_patch_size * 3


def content_key(plan: Plan, limits: InputLimits, device: torch.device) -> Hashable | None:
    """Return a key; equal ones mean equal patches: of the same state of the same files, read in the same way. None without a file.

    All of the plan counts but for what no pixel depends on.
    """
    path = plan.info.path
    if plan.info.container == ARRAY:
        return None
    try:
        paths = [path]
        if os.path.isdir(path):
            paths = files(path, IMAGES)
        states = [os.stat(name) for name in paths]
    except (OSError, ValueError):
        return None
    # The time of the last change of the file's entry tells also of a file whose size and time were set back.
    state = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states]
    read = replace(
        plan,
        info=replace(plan.info, path=""),
        sampling=replace(plan.sampling, wanted=0),
        frame_limit=0,
        token_limit=0,
        token_capped=False,
        tower=None,
        pruning=None,
        unshrunk=None,
        name="",
        limited=False,
        subtitles=NOTHING_SAID,
    )
    sizes = limits.patch_size, limits.temporal_patch_size, limits.merge_size
    return repr((state, read, sizes, str(device)))
