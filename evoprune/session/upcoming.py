"""Several inputs in flight: the next inputs are opened and read while the current one is answered.

Readings start in order, several at a time if cores are idle. At most as many inputs wait as are read at a time. If the model
computes on the CPU with all cores, only one input is read while the previous one is answered, so reading later inputs does not slow
it down.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import TypeVar

from evoprune.backend import Host
from evoprune.session.encoding import OpenInputs
from evoprune.session.loading.model import LoadedModel
from evoprune.session.reading import Reading, Readings, stop_all
from evoprune.video import keep_idle

T = TypeVar("T")

MAX_READERS = 8  # maximum number of inputs to read at a time
READER_BYTES = 2**30  # memory per reader: a decoder, waiting frames, and patches


def readers(loaded: LoadedModel) -> int:
    """Return the number of inputs to read at a time: one per two idle cores, if memory allows.

    The result is at least 1 and at most `MAX_READERS`.
    """
    available = Host().available_memory()
    most = MAX_READERS
    if available is not None:
        most = min(most, available // READER_BYTES)
    return max(1, min(loaded.idle_cores // 2, most))


def in_flight(
    items: Iterable[T],
    opened: Callable[[T, int | None], OpenInputs],
    loaded: LoadedModel,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Generator[tuple[T, OpenInputs | Exception], None, None]:
    """Yield items in order, each with its open inputs, or with the exception that opening them raised.

    Background threads open the inputs of the next items and read them ahead: one item per two idle cores, at most eight at a time,
    and fewer if memory is short. While the caller encodes an item and asks about it, the next items are read:

        def opened(path, cores):
            inputs = open_inputs(session, [path])
            inputs.use_cores(cores)
            inputs.begin()
            return inputs

        with closing(in_flight(paths, opened, session.loaded)) as items:
            for path, inputs in items:
                if isinstance(inputs, Exception):
                    continue
                with inputs:
                    encoded = inputs.encode()
                print(path, encoded.ask("What happens?"))

    The caller closes each `OpenInputs` that it receives, and closes this generator when it is done. Closing the generator stops the
    threads and closes all inputs that were not yielded.

    Args:
        items: The items, such as paths. Items are taken only as they are needed, so the iterable may be endless.
        opened: Called in a background thread to open the inputs of an item. The second argument is the number of cores that reading
            may keep busy, or None for all. Pass it to `OpenInputs.use_cores`, then call `OpenInputs.begin`, so that the time spent
            reading ahead is not reported as waiting. `in_flight` itself calls `OpenInputs.read`.
        loaded: The model, which determines how many cores are idle.
        on_wait: Called with the time that the caller waited for each item, in seconds.

    Yields:
        Each item with its inputs, or with any `Exception` that `opened` raised for the item, usually a `VideoError` or a
        `UsageError`. Later items are not affected. Errors while frames are read are raised by `OpenInputs.encode` instead.

    Raises:
        Exception: Any exception raised by iterating over `items`.
    """
    count = readers(loaded)
    share = max(1, loaded.idle_cores // count)
    coming = iter(items)
    flying: deque[tuple[T, Reading[OpenInputs]]] = deque()

    def opening(item: T, cores: int | None, reading: Reading) -> Iterator[OpenInputs]:
        inputs = opened(item, cores)
        yield inputs
        with suppress(Exception):  # `OpenInputs.encode` raises the error again
            inputs.read()

    with keep_idle(count + 1), Readings(at_once=count) as group:  # one extra process for the item being answered
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
                del inputs, reading  # so that the caller can free them before the next item is ready
        finally:
            stop_all([reading for _, reading in flying])
