"""How the server ends: what waits is refused, and what is being answered has a moment to be complete."""

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from evoprune_serve.work import Work

GRACE_S = 3.0  # for the answer in progress
CLOSING_S = 5  # for all connections; more than that


class EndingServer(uvicorn.Server):
    """A server whose clients are told that it ends."""

    def __init__(self, config: uvicorn.Config, work: Work):
        super().__init__(config)
        self._work = work

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._work.refuse()
        giving_up = asyncio.get_running_loop().call_later(GRACE_S, self._work.give_up)
        await super().shutdown(sockets)
        giving_up.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        del self._captured_signals[1:]  # each is raised in the end: one is enough
        # A second Ctrl-C: who ends it at once wants no account of what is unfinished.
        logging.getLogger("uvicorn.error").disabled = self.force_exit
