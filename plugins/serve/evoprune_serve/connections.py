"""How long a connection may be held without a request."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0  # in which the head of a request must come


class Connection(H11Protocol):
    """A connection of HTTP that is closed when the head of a request is not complete after `head_s`.

    That time begins with the connection, and after a request with the first byte of the next one. Between the two uvicorn's own
    limit holds (5 s), for bodies those of guard.py, for answers `--timeout`.
    """

    head_s = HEAD_S
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._limit_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_head()

    def connection_lost(self, problem: Exception | None) -> None:
        self._stop()
        super().connection_lost(problem)

    def _limit_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # a head has come
            self._stop()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.head_s, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
