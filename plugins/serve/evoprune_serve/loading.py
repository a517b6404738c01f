"""Answers /health, /v1/evoprune, and the page while the models load, and keeps other connections waiting. Does not import torch."""

import re
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MOST_CONNECTIONS = 256  # maximum number of connections that wait; further ones wait in the socket's queue
HEAD_BYTES = 2**14  # maximum size of a request that is answered while the models load
RETRY_S = 5  # time after which a client may ask again
REFRESH_S = 2  # time after which a browser reloads the page
REQUEST = re.compile(rb"GET (/health|/v1/evoprune|/)(?:\?[^ ]*)? HTTP/1\.[01]\r\n(?:.+\r\n)*\r\n")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Ask a video – evoprune</title>
<p>The model is loading. The page opens as soon as it is ready.</p>
</html>
"""


def _answer(kind: str, content: str, *headers: str) -> bytes:
    data = content.encode()
    lines = [
        "HTTP/1.1 503 Service Unavailable",
        f"Content-Type: {kind}",
        f"Content-Length: {len(data)}",
        f"Retry-After: {RETRY_S}",
        "Cache-Control: no-store",
        "Connection: close",  # so that the client's next request reaches the server
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + data


ANSWERS = {
    b"/health": _answer("application/json", '{"status":"loading"}'),
    b"/v1/evoprune": _answer("application/json", '{"status":"loading"}'),
    b"/": _answer(
        "text/html; charset=utf-8", PAGE, f"Refresh: {REFRESH_S}", "Content-Security-Policy: default-src 'none'"
    ),
}


@contextmanager
def answering(listening: socket.socket) -> Iterator[list[socket.socket]]:
    """Accept connections in another thread while the block runs.

    Requests for /health, /v1/evoprune, and the page are answered at once. All other connections wait, unread, for the server.

    Yields:
        A list that contains the waiting connections after the block has ended. If the block raises an exception, they are closed.
    """
    waiting: list[socket.socket] = []
    ending, wake = socket.socketpair()
    thread = threading.Thread(target=_accept, args=(listening, wake, waiting), name="evoprune-loading", daemon=True)
    with ending, wake:
        try:
            thread.start()
            yield waiting
        except BaseException:
            ending.close()
            if thread.is_alive():  # unless Ctrl-C was pressed before it started
                thread.join()
            for connection in waiting:
                connection.close()
            raise
        ending.close()
        thread.join()


def _accept(listening: socket.socket, wake: socket.socket, waiting: list[socket.socket]) -> None:
    """Accept connections until `wake` is readable, and put all that have not been answered into `waiting`."""
    silent: set[socket.socket] = set()  # connections that have sent nothing so far
    with selectors.DefaultSelector() as selector:
        try:
            listening.setblocking(False)
            selector.register(wake, selectors.EVENT_READ)
            selector.register(listening, selectors.EVENT_READ)
        except (OSError, ValueError):  # a signal came before this thread began, so the sockets are closed
            return
        while True:
            for key, _ in selector.select():
                if key.fileobj is wake:
                    waiting += silent
                    return
                if key.fileobj is not listening:
                    selector.unregister(key.fileobj)
                    silent.discard(key.fileobj)
                    if not _answered(key.fileobj):
                        waiting.append(key.fileobj)
                    continue
                with suppress(OSError):  # the client is already gone
                    connection, _ = listening.accept()
                    connection.setblocking(False)
                    silent.add(connection)
                    selector.register(connection, selectors.EVENT_READ)
                if len(silent) + len(waiting) >= MOST_CONNECTIONS:
                    selector.unregister(listening)


def _answered(connection: socket.socket) -> bool:
    """Answer a connection's request and close it. If there is no answer yet, return False and leave the request unread."""
    try:
        sent = connection.recv(HEAD_BYTES, socket.MSG_PEEK)
        request = REQUEST.fullmatch(sent)
        if sent and not request:
            return False
        if request:
            connection.recv(HEAD_BYTES)
            connection.send(ANSWERS[request[1]])
    except OSError:
        pass
    connection.close()
    return True
