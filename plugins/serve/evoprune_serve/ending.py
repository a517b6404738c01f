"""Shuts the server down gracefully: waiting requests are rejected, and the answer in progress has a few seconds to finish."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import uvicorn

from evoprune_serve.guard import Activity
from evoprune_serve.work import Work

GRACE_S = 3.0  # time for the answer in progress to finish, in seconds
CLOSING_S = 5  # time for all connections to close, in seconds; must be longer than `GRACE_S`


class EndingServer(uvicorn.Server):
    """A uvicorn server that rejects waiting requests when it shuts down.

    Args:
        waiting: Connections that were accepted before the server started.
        activity: Requests in progress, and the time of the last one.
        idle_s: Time without requests after which the server shuts down, in seconds, or None.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        work: Work,
        waiting: Sequence[socket.socket] = (),
        activity: Activity | None = None,
        idle_s: float | None = None,
    ):
        super().__init__(config)
        self._work = work
        self._waiting = waiting
        self._activity = activity
        self._idle_s = idle_s

    async def on_tick(self, counter: int) -> bool:
        """Return True if the server should shut down. Called every 0.1 s."""
        idle = self._idle_s is not None and self._activity is not None and self._activity.idle_s() > self._idle_s
        return await super().on_tick(counter) or idle

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        for connection in self._waiting:
            with suppress(OSError):  # the client is gone
                await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._work.refuse()
        giving_up = asyncio.get_running_loop().call_later(GRACE_S, self._work.give_up)
        await super().shutdown(sockets)
        giving_up.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        del self._captured_signals[1:]  # uvicorn re-raises all captured signals on exit, but one is enough
        if self.force_exit:  # second Ctrl-C, which may arrive inside this method: don't list the open requests
            logging.getLogger("uvicorn.error").disabled = True
