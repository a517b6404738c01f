"""Keep several inputs in flight: open and read the next inputs while the current one is being answered.

The inputs are read in order, and more than one is read at a time if there are idle cores. At most as many inputs wait in the queue
as are read at a time. If the model computes on the CPU with all cores, only one input is read while the previous one is being
answered, so that reading later inputs does not slow down the answer.
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

MAX_READERS = 8  # maximum number of inputs that are read at a time
READER_BYTES = 2**30  # memory that a reader may need for its decoder, waiting frames and patches


def readers(loaded: LoadedModel) -> int:
    """Return how many inputs to read at a time: one for every two idle cores, or fewer if little memory is available.

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
    """Yield items in order, each with its open inputs, or with the exception that was raised when they were opened.

    Background threads open the inputs of the next items and read them ahead. They read one item for every two idle cores, up to
    eight items at a time, and fewer if little memory is available. This happens while the caller encodes an item and asks questions
    about it:

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

    The caller must close each `OpenInputs` that it receives, and must close this generator when it is done. Closing the generator
    stops the threads and closes all inputs that were not yielded.

    Args:
        items: The items, such as paths. The iterable may be infinite, because items are taken only as they are needed.
        opened: Called in a background thread to open the inputs of an item. Its second argument is the number of cores that reading
            may keep busy, or None for all cores. The function should pass this number to `OpenInputs.use_cores`. It should then
            call `OpenInputs.begin`, so that the time spent reading ahead is not reported as waiting time. `in_flight` itself calls
            `OpenInputs.read`.
        loaded: The model, which determines how many cores are idle.
        on_wait: Called with the number of seconds that the caller had to wait for each item.

    Yields:
        Each item with its inputs, or with the `Exception` that `opened` raised for it, which is usually a `VideoError` or a
        `UsageError`. Other items are not affected by such an error. An error that occurs while frames are being read is raised
        later, by `OpenInputs.encode`.

    Raises:
        Exception: Any exception that is raised by iterating over `items`.
    """
    count = readers(loaded)
    share = max(1, loaded.idle_cores // count)
    coming = iter(items)
    flying: deque[tuple[T, Reading[OpenInputs]]] = deque()

    def opening(item: T, cores: int | None, reading: Reading) -> Iterator[OpenInputs]:
        inputs = opened(item, cores)
        yield inputs
        with suppress(Exception):  # `OpenInputs.encode` will raise the error again
            inputs.read()

    # Keep one more process than there are readers, for the item that is being answered.
    with keep_idle(count + 1), Readings(at_once=count) as group:
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
                del inputs, reading  # lets the caller free them before the next item is ready
        finally:
            stop_all([reading for _, reading in flying])
