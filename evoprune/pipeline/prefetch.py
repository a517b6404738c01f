"""Items made in a thread, before the thread that uses them asks for them."""

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

DEPTH = 2
PATIENCE_S = 3.0  # how long closing waits for the item that is being made


def prefetched(items: Generator[T, None, None], depth: int = DEPTH) -> Iterator[T]:
    """Yields items in order while a thread makes the next ones, at most `depth` of them.

    The thread, which also closes `items`, starts with the first item that is asked for. When this iterator is exhausted, is closed
    or raises, the thread finishes the item it is making and ends. Where that takes longer than `PATIENCE_S`, as a read that hangs
    does, it is left to end by itself. Whatever making an item raises comes after all items before it.
    """
    made: SimpleQueue[tuple[list[T], BaseException | None]] = SimpleQueue()
    room, stopped = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        problem = None
        try:
            with closing(items):
                while room.acquire() and not stopped.is_set():
                    made.put(([next(items)], None))
        except StopIteration:
            pass
        except BaseException as found:
            problem = found
        made.put(([], problem))

    # A daemon thread that hangs does not keep the program from ending.
    thread = threading.Thread(target=work, name="evoprune-prefetch", daemon=True)
    try:
        thread.start()
        while True:
            item, problem = made.get()
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
            thread.join(PATIENCE_S)
