"""Limits the number of connections, and the time a connection may take to send a request head."""

import asyncio
from collections import Counter

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0  # time limit for receiving a request head, in seconds
MOST = 512  # maximum number of connections
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 19\r\n\r\nService Unavailable"


class Connection(H11Protocol):
    """An HTTP connection that is closed if a request head isn't complete after `head_s` seconds.

    At most `most` connections are allowed in total, and at most `share` connections per client address. If a new connection exceeds
    one of these limits, an idle connection (without a request in progress) is closed. If the client exceeds its share, this is the
    client's longest-idle connection; otherwise, it is the longest-idle connection of the client with the most connections. If no
    connection is idle, the new connection is rejected.

    For the first request, the time limit starts when the connection opens. For later requests, it starts with the first byte. If no
    further request arrives, uvicorn closes the connection after 5 s. The time limits for bodies and answers are set in guard.py and
    by `--timeout`, respectively.
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
        """Close an idle connection if there are too many. If no other connection is idle, close this one."""
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
