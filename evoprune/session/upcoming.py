"""Inputs are read ahead: those that come next are probed, planned, decoded and cut into patches while one is answered.

They are begun in their order, several at a time where cores are idle, and no more wait than are read at a time. So on a CPU that
computes with all its cores, one input is read while the one before it is answered, and none competes with the one that comes next.
Of several, the one that comes next is begun with all cores, those behind it with an equal share.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from contextvars import copy_context
from typing import Generic, TypeVar

import torch

from evoprune.backend.devices import busy_cores
from evoprune.backend.limits import available_cores, available_memory
from evoprune.session.encoding import OpenInputs
from evoprune.session.loading.model import LoadedModel
from evoprune.session.patches import PATIENCE_S
from evoprune.video.sandbox.isolation import Scope, keep_idle

T = TypeVar("T")

MOST = 8  # inputs that are read at a time
READER_BYTES = 2**30  # of memory for each: a decoder, frames that wait, and patches


def idle_cores(loaded: LoadedModel) -> int:
    """Return how many cores the model leaves to reading; perhaps none.

    The model keeps `busy_cores` busy. `--threads N` allows N cores in all.
    """
    cores = available_cores()
    if loaded.cores is not None:
        cores = min(cores, loaded.cores)
    return max(0, cores - busy_cores(torch.device(loaded.device)))


def readers(loaded: LoadedModel) -> int:
    """Return how many inputs are read at a time: one for each two idle cores, as memory allows, at least one and at most `MOST`."""
    available = available_memory()
    most = MOST
    if available is not None:
        most = min(most, available // READER_BYTES)
    return max(1, min(idle_cores(loaded) // 2, most))


class Upcoming(Iterator[tuple[T, OpenInputs | Exception]], Generic[T]):
    """Yields items in their order, each with its inputs, opened by a thread, or with the exception that opening them raised.

    Threads also read the inputs to their ends where they are kept in memory. They take a further item only when fewer wait than
    are read at a time. The caller closes the inputs that it gets, and this iterator, which closes the others.

    Args:
        opened: opens the inputs of an item, given the cores that reading it may keep busy, None for all.
        loaded: the model, by which `readers` says how many items are read at a time.

    Attributes:
        waited_s: how long the caller has waited for items, in seconds.
    """

    def __init__(self, items: Iterable[T], opened: Callable[[T, int | None], OpenInputs], loaded: LoadedModel):
        self.waited_s = 0.0
        self._items = iter(items)
        self._opened = opened
        self._loaded = loaded
        self._count = readers(loaded)
        self._share = max(1, idle_cores(loaded) // self._count)  # cores of each
        self._reading = 0  # how many items are being opened or read
        self._waiting: deque[_Opening[T]] = deque()
        self._exhausted = self._stopped = False
        self._problem: BaseException | None = None  # that making the next item raised
        self._changed = threading.Condition()
        self._taking = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._scope = Scope()
        self._cleanup = ExitStack()

    def __next__(self) -> tuple[T, OpenInputs | Exception]:
        start = time.perf_counter()
        with self._changed:
            if not self._threads and not self._stopped:
                self._begin()
            self._changed.wait_for(self._can_go_on)
            if not self._waiting:
                raise self._problem or StopIteration
            opening = self._waiting.popleft()
            self._changed.notify_all()
        self.waited_s += time.perf_counter() - start
        if not isinstance(opening.result, OpenInputs | Exception):  # what ends the program
            raise opening.result
        return opening.item, opening.result

    def close(self) -> None:
        with self._changed:
            self._stopped = self._exhausted = True
            left = [opening.result for opening in self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for inputs in left:
            if isinstance(inputs, OpenInputs):
                inputs.close()
        self._scope.stop()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        self._cleanup.close()

    def _begin(self) -> None:
        self._cleanup.enter_context(keep_idle(self._count + 1))  # one more is of the item that is answered
        for _ in range(self._count):
            # A daemon thread that hangs does not keep the program from ending.
            run = copy_context().run  # so that whatever stops this thread also stops the one that it starts
            thread = threading.Thread(target=run, args=(self._work,), name="evoprune-read-ahead", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _can_go_on(self) -> bool:
        return self._waiting[0].result is not None if self._waiting else self._exhausted

    def _work(self) -> None:
        self._scope.enter()
        while opening := self._taken():
            try:
                cores = self._share
                if opening.first:
                    cores = self._loaded.cores
                inputs = self._opened(opening.item, cores)
            except BaseException as problem:
                inputs = problem
            with self._changed:
                stopped = self._stopped
                opening.result = inputs
                self._changed.notify_all()
            if isinstance(inputs, OpenInputs):
                if stopped:
                    inputs.close()
                else:
                    with suppress(Exception):  # whoever encodes the inputs meets it again, unless nobody wants them
                        inputs.read()
            with self._changed:
                self._reading -= 1
            del opening, inputs  # the caller may free them before there is another item

    def _taken(self) -> "_Opening[T] | None":
        """Return the next item, once there is room for it; None where no more is to be taken."""
        with self._taking:  # items are made one after the other, in their order
            with self._changed:
                self._changed.wait_for(lambda: self._exhausted or len(self._waiting) < self._count)
                if self._exhausted:
                    return None
            opening = None
            try:
                opening = _Opening(next(self._items))
            except StopIteration:
                pass
            except BaseException as problem:
                self._problem = problem
            with self._changed:
                if opening and not self._stopped:
                    opening.first = self._count == 1 or not (self._waiting or self._reading)
                    self._reading += 1
                    self._waiting.append(opening)
                else:
                    self._exhausted = True
                    opening = None
                self._changed.notify_all()
            return opening


class _Opening(Generic[T]):
    """An item, and its inputs once they are opened, or what opening them raised."""

    def __init__(self, item: T):
        self.item = item
        self.first = True  # whether nothing that comes before it was still to be read
        self.result: OpenInputs | BaseException | None = None
