"""Several inputs in flight: the next inputs are opened and read while one is answered.

Reading starts in order, several inputs at a time if cores are idle. At most as many inputs wait as are read at a time. If a CPU
computes with all its cores, one input is read while the one before it is answered, and no later input slows it down.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import TypeVar

from evoprune.backend import Host
from evoprune.session.encoding import OpenInputs
from evoprune.session.loading.model import LoadedModel
from evoprune.session.reading import Reading, Readings, stop_all
from evoprune.video import keep_idle

T = TypeVar("T")

MOST = 8  # largest number of inputs to read at a time
READER_BYTES = 2**30  # memory per reader: a decoder, waiting frames, and patches


def readers(loaded: LoadedModel) -> int:
    """Return the number of inputs to read at a time: one per two idle cores, if memory allows.

    At least one and at most `MOST`.
    """
    available = Host().available_memory()
    most = MOST
    if available is not None:
        most = min(most, available // READER_BYTES)
    return max(1, min(loaded.idle_cores // 2, most))


def in_flight(
    items: Iterable[T],
    opened: Callable[[T, int | None], OpenInputs],
    loaded: LoadedModel,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[tuple[T, OpenInputs | Exception]]:
    """Yield items in order, each with its inputs, or with the exception that opening them raised.

    Threads open and read the inputs of the next items (`readers` at a time). The caller closes the inputs that it gets, and this
    iterator, which closes all other inputs.

    Args:
        opened: Opens the inputs of an item. Its second argument is the number of cores that reading may keep busy, None for all.
            The next item gets all cores, and the items after it share the idle ones.
        loaded: The model.
        on_wait: Called with the seconds that the caller has waited for each item.
    """
    count = readers(loaded)
    share = max(1, loaded.idle_cores // count)
    coming = iter(items)
    flying: deque[tuple[T, Reading[OpenInputs]]] = deque()

    def opening(item: T, cores: int | None, reading: Reading) -> Iterator[OpenInputs]:
        inputs = opened(item, cores)
        yield inputs
        with suppress(Exception):  # encoding the inputs raises the error again
            inputs.read()

    with keep_idle(count + 1), Readings(at_once=count) as group:  # one more process for the item that is answered
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
                del inputs, reading  # the caller may free them before the next item is ready
        finally:
            stop_all([reading for _, reading in flying])
