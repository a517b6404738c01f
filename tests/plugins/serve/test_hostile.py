"""The server stays responsive and small while eight clients send hostile requests. Run with `-m slow -s`, which prints figures."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.plugins.serve.serving import CHAT, REASON
from tests.plugins.serve.test_process import serving

pytest.importorskip("starlette", reason=REASON)
CLIENTS = 8
SECONDS = 8.0  # how long the clients send
HEALTH_S = 1.0  # maximum time to the answer of /health
MEMORY_BYTES = 10**9  # maximum memory of the server
MIB = 2**20
KEY = "secret"


def json_body(inner: bytes, size: int = 59 * MIB) -> list[bytes]:
    """Return a request whose question consists of copies of a JSON value."""
    return [b'{"messages": [', b",".join([inner] * (size // (len(inner) + 1))), b"]}"]


def upload(data: bytes, size: int = 59 * MIB) -> list[bytes]:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return [head, data * (size // len(data)), b"\r\n--b--\r\n"]


TINY = b"".join(b"1\r\n%b\r\n" % (b"[" if number % 2 else b"]") for number in range(2**20))
ASKED = (
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "video", "video": "%b"}]}]}'
)


def asking(url: list[bytes]) -> list[bytes]:
    before, after = ASKED.split(b"%b")
    return [before, *url, after]


BODIES = {
    "nested lists": lambda: json_body(b"[" * 90 + b"]" * 90),
    "nested objects": lambda: json_body(b'{"":' * 90 + b"0" + b"}" * 90),
    "almost too many values": lambda: json_body(b'{"":' * 90 + b"0" + b"}" * 90, 2**17 * 5),
    "escapes": lambda: [b'{"messages": "', b"\\u0041" * (59 * MIB // 6), b'"}'],
    "a long option": lambda: [b'{"messages": [], "a": "', b"a" * 59 * MIB, b'"}'],
    "one emoji": lambda: asking([b"data:;base64,", b"A" * 59 * MIB, "😀".encode()]),
    "almost a video": lambda: asking([b"data:;base64,", b"AAAA" * (59 * MIB // 4)]),
    "long integers": lambda: [b'{"messages": 1', b"1" * 59 * MIB, b"}"],
    "long fractions": lambda: [b'{"messages": 0.', b"1" * 59 * MIB, b"}"],
    "line breaks in an upload": lambda: upload(b"\r\n--"),
    "boundaries in an upload": lambda: upload(b"\r\n--c"),
}
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEADS = {"headers": HEALTH[:-2] + b"a:\r\n" * 50_000 + b"\r\n", "later requests": HEALTH * 5000}


def head(path: str, key: str | None, more: str) -> bytes:
    kind = "application/json" if path == CHAT else "multipart/form-data; boundary=b"
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", more]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@contextmanager
def sending(port: int, sent: list[bytes]) -> Iterator[None]:
    """Send the same bytes again and again, over new connections, from `CLIENTS` addresses."""
    ending = threading.Event()

    def send(number: int) -> None:
        while not ending.is_set():
            try:
                address = f"127.0.0.{number + 2}"
                with socket.create_connection(("127.0.0.1", port), 20, (address, 0)) as connection:
                    connection.settimeout(20)
                    for piece in sent:
                        for start in range(0, len(piece), MIB):
                            if ending.is_set():
                                return
                            connection.sendall(memoryview(piece)[start : start + MIB])
                    connection.recv(1000)
            except OSError:  # the server refuses the body before its end
                pass

    threads = [threading.Thread(target=send, args=(number,)) for number in range(CLIENTS)]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        ending.set()
        for each in threads:
            each.join()


def slowest_health(port: int, seconds: float) -> float:
    """Return the longest time until /health answered, in seconds."""
    end = time.monotonic() + seconds
    slowest = 0.0
    while time.monotonic() < end:
        began = time.monotonic()
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"status": "ok"}
        connection.close()
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.05)
    return slowest


def peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def sent_as(name: str, key: str | None) -> list[bytes]:
    if name in BODIES:
        pieces = BODIES[name]()
        path = "/v1/files" if "upload" in name else CHAT
        return [head(path, key, f"Content-Length: {sum(map(len, pieces))}"), *pieces]
    if name == "chunks":
        return [head(CHAT, key, "Transfer-Encoding: chunked"), *[TINY] * 10, b"0\r\n\r\n"]
    return [HEADS[name]]


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, KEY], ids=["without key", "with key"])
def test_health_answers_while_hostile_bodies_arrive(key, tmp_path):
    """One server gets all kinds in turn, because memory that one kind leaves behind counts, too."""
    options = ("--api-key", KEY) if key else ("--quiet",)
    with serving(tmp_path, *options) as (server, port):
        for name in (*BODIES, "chunks", *HEADS):
            sent = sent_as(name, key)
            with sending(port, sent):
                slowest = slowest_health(port, SECONDS)
            peak = peak_bytes(server.pid)
            print(f"\n{name}: /health within {slowest:.2f} s, peak so far {peak / MIB:.0f} MiB")
            assert slowest < HEALTH_S
            assert peak < MEMORY_BYTES
