"""Keep multiple inputs in flight: open and read the next inputs while the model answers questions about the current one.

Inputs are read in order. If there are idle cores, multiple inputs are read at a time. The queue never contains more inputs than
there are readers. If the model runs on the CPU and uses all cores, only one input is read ahead, so that reading doesn't slow down
the answers.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from evoprune.backend import Host
from evoprune.session.encoding import OpenInputs
from evoprune.session.loading.model import LoadedModel
from evoprune.session.reading import Prefetcher, Reading
from evoprune.video import keep_idle

T = TypeVar("T")

MAX_READERS = 8  # maximum number of inputs to read at a time
READER_BYTES = 2**30  # memory that a reader may need for its decoder, frames, and patches, in bytes


def readers(loaded: LoadedModel) -> int:
    """Return how many inputs to read at a time: one for every two idle cores, or fewer if memory is low.

    The result is at least 1 and at most `MAX_READERS`.
    """
    available = Host().available_memory()
    most = MAX_READERS
    if available is not None:
        most = min(most, available // READER_BYTES)
    return max(1, min(loaded.idle_cores // 2, most))


def in_flight(
    items: Iterable[T],
    opened: Callable[[T], OpenInputs],
    loaded: LoadedModel,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Generator[tuple[T, OpenInputs | Exception], None, None]:
    """Yield items in order, each with its open inputs or the exception raised while opening them.

    While the caller encodes an item and asks questions about it, background threads open and read the inputs of the next items.
    They read one item for every two idle cores, up to eight items at a time, or fewer if memory is low:

        def opened(path):
            return open_inputs(session, [path])

        with closing(in_flight(paths, opened, session.loaded)) as items:
            for path, inputs in items:
                if isinstance(inputs, Exception):
                    continue
                with inputs:
                    encoded = inputs.encode()
                print(path, encoded.ask("What happens?"))

    The caller must close each `OpenInputs` it receives, and must close this generator when it is done. Closing the generator stops
    the threads and closes all inputs not yet yielded.

    Args:
        items: The items, such as paths. The iterable is consumed lazily, so it may be infinite.
        opened: Called in a background thread to open an item's inputs.
        loaded: The model, which determines how many cores are idle.
        on_wait: Called with the time the caller had to wait for each item, in seconds.

    Yields:
        For each item, a tuple of the item and its inputs. If `opened` raises an `Exception`, usually a `VideoError` or a
        `UsageError`, the exception takes the place of the inputs, and other items aren't affected. Errors while reading frames are
        raised later, by `OpenInputs.encode`.

    Raises:
        Exception: Any exception raised while iterating over `items`, after the earlier items have been yielded.
            KeyboardInterrupt and the like are raised at once.
    """
    count = readers(loaded)
    share = max(1, loaded.idle_cores // count)

    def read(item: T, reading: Reading[OpenInputs]) -> Iterator[OpenInputs]:
        inputs = opened(item)
        inputs.use_cores(loaded.cores if reading is ahead.unfinished[0] else share)
        with suppress(Exception):  # `OpenInputs.encode` will raise the error again
            inputs.begin()  # before the caller encodes, so that it doesn't wait
        yield inputs
        with suppress(Exception):
            inputs.read()

    ahead = Prefetcher(items, read, most=count + 1, at_once=count, drop=lambda inputs: inputs.close())
    # Keep one more idle worker process than there are readers, for the item currently being answered.
    with keep_idle(count + 1), ahead:
        while True:
            start = time.perf_counter()
            ahead.fill()
            if not ahead.queue:
                return
            item, reading = ahead.queue[0]  # stays in the queue while waiting, so that an interrupt closes it
            try:
                inputs: OpenInputs | Exception = next(reading.chunks())
            except Exception as error:
                inputs = error
            ahead.queue.popleft()
            try:
                on_wait(time.perf_counter() - start)
            except BaseException:
                if isinstance(inputs, OpenInputs):
                    inputs.close()
                raise
            yield item, inputs
            del inputs, reading  # let the caller free them before the next item is ready
