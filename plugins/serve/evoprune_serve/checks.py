"""Limits how many schemas are checked at once, because each check is a process that may take 5 s."""

import asyncio
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

from starlette.concurrency import run_in_threadpool

MOST = 2  # maximum number of simultaneous checks
T = TypeVar("T")


class Checks:
    """Runs checks in threads: at most `MOST` at once, and only one per client."""

    def __init__(self):
        self._free = asyncio.Semaphore(MOST)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by client

    async def run(self, client: str, check: Callable[[], T]) -> T:
        """Call a function in a thread when it is the client's turn. If canceled before that, it isn't called."""
        turn = self._turns.setdefault(client, asyncio.Lock())
        async with turn, self._free:
            checking = asyncio.ensure_future(run_in_threadpool(check))
            try:
                return await asyncio.shield(checking)
            finally:  # a thread can't be canceled, so the next check waits for it
                await asyncio.wait([checking])
