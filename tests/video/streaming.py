"""A local HTTP server with streams that behave in various ways. No stream lasts longer than `LONGEST_S`."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

LONGEST_S = 30.0  # maximum duration of a stream in seconds


class Streams(http.server.BaseHTTPRequestHandler):
    """Serves a clip. A request for /NAME runs the method that `DEEDS` lists for NAME."""

    def __init__(self, clip: bytes, visits: list[str], *args):
        self.clip, self.visits = clip, visits
        super().__init__(*args)

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.strip("/").partition(".")[0].partition("?")[0]
        self.visits.append(name)
        with suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, f"_{name}")()

    def _begin(self, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def _whole(self) -> None:
        self._begin(Content_Length=str(len(self.clip)), Content_Type="video/mp2t")
        self.wfile.write(self.clip)

    def _live(self) -> None:
        self._begin(Content_Type="video/mp2t")
        self.wfile.write(self.clip)

    def _twice(self) -> None:
        """Send the stream to the first two requests, the second time after a second; answer later requests with status 404."""
        if self.visits.count("twice") > 2:
            self._begin(404)
        else:
            time.sleep(self.visits.count("twice") - 1)
            self._live()

    def _stall(self) -> None:
        self._begin(Content_Type="video/mp2t")
        self.wfile.write(self.clip[: len(self.clip) * 3 // 4])
        self.wfile.flush()
        time.sleep(LONGEST_S)

    def _silent(self) -> None:
        time.sleep(LONGEST_S)

    def _garbage(self) -> None:
        self._begin(Content_Type="video/mp2t")
        end = time.monotonic() + LONGEST_S
        while time.monotonic() < end:
            self.wfile.write(bytes(range(256)) * 64)

    def _mixed(self) -> None:
        """Send the clip with garbage in the middle."""
        self._begin(Content_Type="video/mp2t")
        middle = len(self.clip) // 2 // 188 * 188
        self.wfile.write(self.clip[:middle] + b"\x13" * 20_000 + self.clip[middle:])

    def _secret(self) -> None:
        if self.headers.get("Authorization"):
            self._live()
        else:
            self._begin(401, WWW_Authenticate='Basic realm="x"', Content_Length="0")

    def _playlist(self) -> None:
        """Send a playlist whose only segment is the local file that the query string names."""
        path = self.path.partition("?")[2]
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{path}\n#EXT-X-ENDLIST\n".encode()
        self._begin(Content_Length=str(len(text)), Content_Type="application/vnd.apple.mpegurl")
        self.wfile.write(text)

    def _loop(self) -> None:
        """Send a playlist that refers to another playlist. The query string of its URL is this URL's query string, reversed."""
        there = self.path.partition("?")[2]
        text = f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1000\n/loop.m3u8?{there[::-1]}\n".encode()
        self._begin(Content_Length=str(len(text)), Content_Type="application/vnd.apple.mpegurl")
        self.wfile.write(text)


@contextmanager
def streams(clip: Path) -> Iterator[tuple[str, list[str]]]:
    """Run the server. Yields its base URL, and a list to which the name in each request is appended."""
    visits: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Streams, clip.read_bytes(), visits))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", visits
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def connection(content: bytes, answers: bool = False) -> Iterator[int]:
    """Run a server that sends `content` to each client, and yield its port. If `answers` is True, it first waits for a request."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                there, _ = listening.accept()
            except OSError:
                return
            with there:
                there.settimeout(LONGEST_S)
                try:
                    while not answers or (request := there.recv(4096)):
                        number = b"" if not answers else request.partition(b"CSeq: ")[2].partition(b"\r\n")[0]
                        there.sendall(content.replace(b"NUMBER", number))
                        if not answers:
                            break
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.close()
