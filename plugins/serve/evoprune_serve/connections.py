"""Limits on the number of connections, and on how long a connection may be held without a request."""

import asyncio
from collections import Counter

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0  # time limit for the head of a request
MOST = 512  # connections
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 19\r\n\r\nService Unavailable"


class Connection(H11Protocol):
    """An HTTP connection that is closed if the head of a request is not complete after `head_s`.

    There are at most `most` connections, and at most `share` from one address. A connection beyond these limits closes the oldest
    idle one, which has no request in progress: from its own address if that exceeds its share, otherwise from the address with the
    most connections. If no connection is idle, the new one is refused.

    `head_s` is counted from the start of the connection, and after a request from the first byte of the next request. Between
    requests, uvicorn's own limit of 5 s applies; for bodies, the limits of guard.py; for answers, `--timeout`.
    """

    head_s = HEAD_S
    most = MOST
    share = MOST // 2
    _timer: asyncio.TimerHandle | None = None
    _idle_since_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._idle_since_s = self.loop.time()
        self._limit_head()
        self._limit_connections()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_head()

    def on_response_complete(self) -> None:
        self._idle_since_s = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, problem: Exception | None) -> None:
        self._stop()
        super().connection_lost(problem)

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _limit_connections(self) -> None:
        """Close an idle connection, or this new one, if there are too many."""
        present = [each for each in self.connections if not each.transport.is_closing()]
        counts = Counter(each._address for each in present)
        greedy = counts[self._address] > self.share
        if not greedy and len(present) <= self.most:
            return
        idle = [each for each in present if each._idle and each is not self]
        if greedy:
            idle = [each for each in idle if each._address == self._address]
        if idle:
            min(idle, key=lambda each: (-counts[each._address], each._idle_since_s)).transport.close()
        else:
            self.transport.write(UNAVAILABLE)
            self.transport.close()

    def _limit_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the head is complete
            self._stop()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.head_s, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
