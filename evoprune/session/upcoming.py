"""Several inputs in flight: those that come next are opened and read while one is answered.

They are begun in their order, several at a time if cores are idle, and no more wait than are read at a time. So on a CPU that
computes with all its cores, one input is read while the one before it is answered, and none competes with the one that comes next.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch

from evoprune.backend.devices import busy_cores
from evoprune.backend.limits import available_cores, available_memory
from evoprune.session.encoding import OpenInputs
from evoprune.session.loading.model import LoadedModel
from evoprune.session.reading import Reading, Readings, stop_all
from evoprune.video.sandbox.isolation import keep_idle

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


def in_flight(
    items: Iterable[T],
    opened: Callable[[T, int | None], OpenInputs],
    loaded: LoadedModel,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[tuple[T, OpenInputs | Exception]]:
    """Yield items in their order, each with its inputs, or with the exception that opening them raised.

    Threads open the inputs of the next items, and read them. The caller closes the inputs that it gets, and this iterator, which
    closes the others.

    Args:
        opened: Opens the inputs of an item, given the cores that reading them may keep busy, None for all. The item that comes next
            gets all, those after it share the idle ones.
        loaded: The model, by which `readers` says how many items are read at a time.
        on_wait: Called with the seconds that the caller has waited for each item.
    """
    count = readers(loaded)
    share = max(1, idle_cores(loaded) // count)
    coming = iter(items)
    flying: deque[tuple[T, Reading[OpenInputs]]] = deque()

    def opening(item: T, cores: int | None, reading: Reading) -> Iterator[OpenInputs]:
        inputs = opened(item, cores)
        yield inputs
        with suppress(Exception):  # whoever encodes the inputs meets it again, unless nobody wants them
            inputs.read()

    with keep_idle(count + 1), Readings(at_once=count) as group:  # one more is of the item that is answered
        try:
            while True:
                start = time.perf_counter()
                for item in coming:
                    cores = share
                    if count == 1 or not group.unfinished:
                        cores = loaded.cores
                    flying.append(
                        (item, Reading(partial(opening, item, cores), group, drop=lambda inputs: inputs.close()))
                    )
                    if len(flying) > count:
                        break
                if not flying:
                    return
                item, reading = flying.popleft()
                try:
                    inputs: OpenInputs | Exception = next(reading.chunks())
                except Exception as problem:
                    inputs = problem
                on_wait(time.perf_counter() - start)
                yield item, inputs
                del inputs, reading  # the caller may free them before there is another item
        finally:
            stop_all([reading for _, reading in flying])
