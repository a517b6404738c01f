"""Making things before they are asked for, in a thread beside the one that uses them."""

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

DEPTH = 2
# How long whoever stops early waits for what is being made just then, in seconds.
PATIENCE_S = 3.0


def ahead(items: Generator[T, None, None], depth: int = DEPTH) -> Iterator[T]:
    """Passes items on, in order, which a thread makes, at most `depth` more than were taken.

    The thread begins with the first item asked for. It has ended, and has closed `items`, when this iterator has come to its end,
    was closed, or has raised; only what is being made just then it finishes first. Where that takes longer than `PATIENCE_S`, as a
    read that hangs does, the thread is left to end by itself.

    Args:
        items: run and closed in the thread.
        depth: at least 1.

    Raises:
        Whatever making an item raises, exceptions that are no `Exception` included, after all items before it.
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

    # A daemon: one that hangs does not keep the program from ending.
    thread = threading.Thread(target=work, name="evoprune-ahead", daemon=True)
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
