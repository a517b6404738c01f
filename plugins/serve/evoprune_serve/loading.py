"""Answers requests with status 503 while the models load. Does not import torch."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from evoprune_serve.connections import Connection
from evoprune_serve.errors import loading
from evoprune_serve.guard import Access, log_line, protection

REFRESH_S = 2  # time after which a browser reloads the page
LINGER_S = 1.0  # time to answer the connections that are open when the models are loaded, in seconds
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Ask a video – evoprune</title>
<p>The model is loading. The page opens as soon as it is ready.</p>
</html>
"""


@contextmanager
def answering(listening: socket.socket, access: Access, log: Callable[[str], None]) -> Iterator[None]:
    """Answer all requests with "loading" while the block runs, in another thread.

    Connections that arrive after the block wait in the socket's queue until another server accepts them.
    """
    config = uvicorn.Config(
        make_app(access, log),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        headers=[("Connection", "close")],  # so that the client's next request reaches the other server
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening.dup()],), name="evoprune-loading", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.001)
    try:
        yield
    finally:
        stopped = threading.Event()
        loop = server.servers[0].get_loop()

        def stop() -> None:
            for each in server.servers:
                each.close()
            stopped.set()
            loop.call_later(LINGER_S, server.handle_exit, signal.SIGTERM, None)

        loop.call_soon_threadsafe(stop)
        stopped.wait()


def make_app(access: Access, log: Callable[[str], None]) -> Starlette:
    """Create the application that answers all allowed requests with status 503 and a Retry-After."""

    def refuse(request: Request, problem: Exception) -> Response:
        log(log_line(request, problem.status, *problem.codes))
        return JSONResponse(problem.body, problem.status, headers=problem.headers)

    def wait(request: Request, problem: Exception) -> Response:
        return refuse(request, loading())

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "loading"}, 503, headers=loading().headers)

    async def page(request: Request) -> Response:
        headers = {
            "Refresh": str(REFRESH_S),
            "Content-Security-Policy": "default-src 'none'",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(PAGE, 503, headers=loading().headers | headers)

    # Every other request causes an HTTPException, because it has no route.
    return Starlette(
        routes=[Route("/health", health), Route("/", page)],
        middleware=protection(access, refuse),
        exception_handlers={HTTPException: wait},
    )
