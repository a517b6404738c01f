"""Limits the number of connections, the time to send a request head, and the work for a single read from a connection."""

import asyncio
import re
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0  # time limit for receiving a request head, in seconds
KEEP_ALIVE_S = 65  # time limit of an idle connection, in seconds; clients and proxies usually reuse one for a minute
MOST = 512  # maximum number of connections
HEAD_BYTES = 2**15  # maximum size of a request head
PIECE_BYTES = 2**14  # chunked bodies are parsed in pieces of this size
MOST_CHUNKS = 256  # small chunks allowed in a body, in addition to one chunk for every `CHUNK_BYTES` bytes
CHUNK_BYTES = 64
END_OF_HEAD = re.compile(rb"\n\r?\n")
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 19\r\n\r\nService Unavailable"


class Parser(h11.Connection):
    """A parser that rejects requests that would block the event loop: large heads, and bodies that consist of tiny chunks.

    asyncio reads up to 256 KiB at once. That is enough for 60,000 headers or 40,000 chunks, which take h11 half a second.
    """

    chunked = False  # whether the body being received is chunked
    _chunks = 0
    _bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:
            received, _ = self.trailing_data
            if len(received) > HEAD_BYTES and not END_OF_HEAD.search(received, 0, HEAD_BYTES):
                raise h11.RemoteProtocolError("the request head is too large", error_status_hint=431)
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data) and self.chunked:
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if self._chunks > MOST_CHUNKS + self._bytes // CHUNK_BYTES:
                raise h11.RemoteProtocolError("the body has too many small chunks")
        return event


class Connection(H11Protocol):
    """An HTTP connection that is closed if a request head isn't complete after `head_s` seconds.

    At most `most` connections are allowed in total, and at most `share` connections per client address. If a new connection exceeds
    one of these limits, an idle connection (without a request in progress) is closed. If the client exceeds its share, this is the
    client's longest-idle connection; otherwise, it is the longest-idle connection of the client with the most connections. If no
    connection is idle, the new connection is rejected.

    For the first request, the time limit starts when the connection opens. For later requests, it starts with the first byte. If no
    further request arrives, uvicorn closes the connection after `KEEP_ALIVE_S` seconds. The time limits for bodies and answers are
    set in guard.py and by `--timeout`, respectively.
    """

    head_s = HEAD_S
    most = MOST
    share = MOST // 2
    _timer: asyncio.TimerHandle | None = None
    _idle_since_s = 0.0

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.conn = Parser(h11.SERVER)
        self.timeout_keep_alive = KEEP_ALIVE_S

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._idle_since_s = self.loop.time()
        self._limit_head()
        self._limit_connections()

    def data_received(self, data: bytes) -> None:
        size = (
            PIECE_BYTES if self.conn.chunked else len(data)
        )  # the parser limits the size of a trailer before each piece
        for start in range(0, len(data), size):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + size])
        self._limit_head()

    def send_400_response(self, msg: str) -> None:
        """Reject an invalid request. If the response has already started, only close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

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
