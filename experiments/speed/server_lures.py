"""What lures the server of `server_load` into its own network: redirects and names. And a server that can be lured.

    python -m experiments.speed.server_lures serve --allow-urls

A redirect into a network comes from outside of it, and where nothing but this machine is reached there is no outside. So the
command starts the server with two functions replaced, in its process alone: `is_public` takes the address OUTSIDE of the loopback
for one of the internet, and the resolver knows NAMES and REBINDING. All else is judged and looked up as usual.

Inside listen servers that must not be reached: they count every connection. They have the port of the one outside, so that they are
also reached where a name is looked up once more after it was checked.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from random import Random
from urllib.parse import quote, unquote

from evoprune_cli.__main__ import start
from evoprune_serve import public

OUTSIDE = "127.9.0.1"
INSIDE = "127.9.0.2"
NAMES = {"outside.test": [OUTSIDE], "inside.test": [INSIDE], "both.test": [OUTSIDE, INSIDE]}
REBINDING = "rebinding.test"  # means OUTSIDE and INSIDE in turn
CODES = (301, 302, 303, 307, 308)
MOST_HOPS = 3
FLOOD_MIB = 64  # much more than the buffers between two programs hold
CLIP = Path(__file__).parents[2] / "samples" / "square.mp4"
REFUSED = "not on the public internet"
NOT_READ = "only http and https are read"
IPV6 = Path("/proc/net/if_inet6")  # the addresses of this machine
IPV6_LOOPBACK = f"{1:032x}"


@dataclass
class Lures:
    """Servers outside and inside, all at one port. `taken`: what must not happen, and did."""

    port: int = 0
    taken: list[str] = field(default_factory=list)

    def url(self, path: str, host: str = "outside.test") -> str:
        return f"http://{host}:{self.port}/{path}"

    def redirect(self, draw: Random, own_port: int) -> tuple[str, str]:
        """Return an address outside that leads elsewhere, in several steps or for ever, and what the server must say of it.

        `own_port`: that of the server which is lured.
        """
        numbers = ("127.0.0.1", INSIDE, "0x7f090002", "[::1]", f"[::ffff:{INSIDE}]")
        names = ("localhost", "inside.test", "both.test")
        inside = [f"{begin}{host}:{self.port}/" for host in numbers + names for begin in ("http://", "https://", "//")]
        inside += [f"http://{host}:{own_port}/health" for host in ("127.0.0.1", "localhost", "[::1]")]
        inside += ["http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://[fe80::1]/"]
        elsewhere = [
            ("file:///etc/passwd", NOT_READ),
            ("data:video/mp4;base64,AAAA", "Invalid URL in location header"),
            ("ftp://127.0.0.1/a", NOT_READ),
            (f"http://outside.test@{INSIDE}:{self.port}/", REFUSED),
            ("/round", "maximum allowed redirects"),
            ("/on/1", "maximum allowed redirects"),
        ]
        target, says = draw.choice([*[(each, REFUSED) for each in inside], *3 * elsewhere])
        for _ in range(draw.randint(1, MOST_HOPS)):
            kind = draw.choice([*CODES, "flood"])
            target = self.url(f"{kind}/{quote(target, safe='')}", draw.choice([OUTSIDE, "outside.test"]))
        return target, says


class Web(ThreadingHTTPServer):
    """A server whose answers are in `Answer`. `inside`: nobody may connect to it."""

    daemon_threads = True

    def __init__(self, host: str, lures: Lures, inside: bool):
        self.lures = lures
        self.inside = inside
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, lures.port), Answer)

    def process_request(self, request: socket.socket, client: tuple) -> None:
        if self.inside:
            self.lures.taken.append(f"a connection to {self.server_address[0]}")
        super().process_request(request, client)


class Answer(BaseHTTPRequestHandler):
    """A redirect that the path describes: CODE/TARGET, flood/TARGET with a long body, round, on/NUMBER; drip; else a clip."""

    server: Web

    def do_GET(self) -> None:
        _, kind, *rest = self.path.split("/")
        with suppress(ConnectionError):  # who is not lured goes in the middle
            if kind == "round":
                self._redirect(302, "/round")
            elif kind == "on":
                self._redirect(302, f"/on/{int(rest[0]) + 1}")
            elif kind == "flood":
                self._redirect(302, unquote(rest[0]))
                self._flood()
            elif kind == "drip":
                self._drip()
            elif kind.isdecimal():
                self._redirect(int(kind), unquote(rest[0]))
            else:
                self._begin(200, "Content-Type", "video/mp4")
                self.wfile.write(CLIP.read_bytes())

    def _redirect(self, code: int, target: str) -> None:
        self._begin(code, "Location", target)

    def _flood(self) -> None:
        for _ in range(FLOOD_MIB):
            self.wfile.write(bytes(2**20))
        self.server.lures.taken.append(f"{FLOOD_MIB} MiB of a redirect were read")

    def _drip(self) -> None:
        """Headers without an end, byte by byte: it is never silent for long."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            self.wfile.write(b"x")
            time.sleep(0.5)

    def _begin(self, status: int, name: str, value: str) -> None:
        self.send_response(status)
        self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@contextmanager
def luring() -> Iterator[Lures]:
    """Provide the servers. Raises OSError: one cannot listen."""
    made = Lures()
    inside = [INSIDE, "127.0.0.1"]
    if IPV6.exists() and IPV6_LOOPBACK in IPV6.read_text():
        inside.append("::1")
    with ExitStack() as stack:
        for host in (OUTSIDE, *inside):
            web = stack.enter_context(Web(host, made, inside=host != OUTSIDE))
            made.port = web.server_port
            threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(web.shutdown)
        yield made


def lured() -> None:
    """Has this process take OUTSIDE for an address of the internet, and know the names."""
    is_public = public.is_public
    look_up = socket.getaddrinfo
    turns = cycle([OUTSIDE, INSIDE])

    def or_outside(address: str) -> bool:
        return address == OUTSIDE or is_public(address)

    def look_up_here(host, *given, **options):
        addresses = [next(turns)] if host == REBINDING else NAMES.get(host, [host])
        return [found for address in addresses for found in look_up(address, *given, **options)]

    public.is_public = or_outside
    socket.getaddrinfo = look_up_here


if __name__ == "__main__":
    lured()
    start()
