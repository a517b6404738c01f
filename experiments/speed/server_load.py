"""Load `evoprune serve`: clients that ask, beside slow, impatient and hostile ones. Prints Markdown tables. Linux.

    python -m experiments.speed.server_load --clients 32 --minutes 5 -o runs/server.md

Half of the clients ask about samples, at changing budgets, and check the answers. An eighth sends its bodies slowly and takes its
answers slowly, an eighth goes before the answer, a quarter is hostile. Each has an address of its own (127.0.0.2 and on), so the
server tells them apart. Before each of five turns the ones that ask are alone, for a third of its time: the queue of an otherwise
idle server. Last the server is killed, and another one is started in the same folder.

Hostile clients also try to have the server follow redirects and names into its own network. There may be no public network where
this runs, so the server takes one address of the loopback for public: server_lures.py starts it, with the resolver and the check of
addresses replaced for that address and a few names.

Exit status 1: a status that docs/server.md does not name for a request, an answer that differs, a failure in the log, a connection
to where a redirect or a name leads, or something that a killed server has left for good.
"""

import argparse
import base64
import json
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from experiments.speed.server_lures import CLIP, NOT_READ, REBINDING, REFUSED, Lures, luring

SAMPLES = Path(__file__).parents[2] / "samples"
ASKED = {
    "square.mp4": "What colour is the square?",
    "three.mp4": "How many shapes are there?",
    "pan.mp4": "What digit is it?",
}
LURED = "experiments.speed.server_lures"
BUDGETS = (0.1, 0.25, 0.5, 1.0)  # with three samples more than the encodings that a server keeps
CHAT = "/v1/chat/completions"
FILES = "/v1/files"
START_S = 180
TIMEOUT_S = 120
TURNS = 5
GONE = "went"  # in place of a status: the client closed the connection
CUT = "cut off"  # in place of a status: the server closed it, without an answer
BUSY = {429, 503}  # what every request may have
MIB = 2**20


@dataclass
class Server:
    """A server of its own process group; its temporary files are in a folder."""

    process: subprocess.Popen
    port: int
    folder: Path
    log: Path

    def connection(self, client: int) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S, source_address=(address(client), 0))

    def socket(self, client: int) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S, (address(client), 0))

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file() and path != self.log]


@contextmanager
def served(folder: Path, *options: str, program: str = "evoprune_cli") -> Iterator[Server]:
    """Provide a server of the demo model that has begun. Raises RuntimeError: it does not begin."""
    log = folder / "server.log"
    command = [sys.executable, "-m", program, "serve", "--port", "0", *options]
    environment = os.environ | {"TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)  # noqa: S603
    try:
        end = time.monotonic() + START_S
        while not (found := re.search(r"http://\S+:(\d+)/v1", log.read_text())):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text())
            time.sleep(0.05)
        server = Server(process, int(found[1]), folder, log)
        while not healthy(server):
            time.sleep(0.05)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def healthy(server: Server) -> bool:
    try:
        with closing(server.connection(0)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except OSError:
        return False


def address(client: int) -> str:
    return f"127.0.0.{2 + client}"


# What is sent.


def url_of(name: str) -> str:
    return "data:video/mp4;base64," + base64.b64encode((SAMPLES / name).read_bytes()).decode()


def body(url: str, question: str = "?", **options) -> bytes:
    shown = {"type": "video_url", "video_url": {"url": url}}
    content = [shown, {"type": "text", "text": question}]
    return json.dumps({"messages": [{"role": "user", "content": content}]} | options).encode()


def png_bomb(side: int = 50_000) -> bytes:
    """Return a small picture file of `side` times `side` black pixels."""
    row = b"\0" * (side // 8 + 1)
    packed = zlib.compressobj(9)
    data = b"".join(packed.compress(row * 1000) for _ in range(side // 1000)) + packed.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def head(path: str, *lines: str, host: str = "localhost") -> bytes:
    """Return the beginning of a request, without its body."""
    return "\r\n".join([f"POST {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


JSON = "Content-Type: application/json"
FORM = "Content-Type: multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\na\r\n'
Status = int | str


class Failure(Exception):
    """An answer is not what it should be."""


def answered(connection: HTTPConnection) -> tuple[int, bytes]:
    response = connection.getresponse()
    return response.status, response.read()


def checked(status: int, text: bytes) -> int:
    """Return the status. Raises Failure: an error has not the form of OpenAI's, or names the server's folder."""
    if status >= 400:
        error = json.loads(text)["error"]
        if {*error} != {"message", "type", "param", "code"} or "evoprune-serve-" in error["message"]:
            raise Failure(f"{status}: {text[:200]!r}")
    return status


def status_of(connected: socket.socket) -> Status:
    """Return the status of what a raw connection is answered."""
    text = b""
    while piece := connected.recv(65536):
        text += piece
    found = re.match(rb"HTTP/1.1 (\d+)", text)
    if not found:
        return CUT
    beginning, _, said = text.partition(b"\r\n\r\n")
    if b"text/plain" in beginning:
        return int(found[1])
    return checked(int(found[1]), said)


class Kinds:
    """Kinds of requests. Each returns the status that the server answered with."""

    def __init__(self, server: Server, lures: Lures):
        self.server = server
        self.lures = lures
        self.bodies = {
            (name, budget): body(url_of(name), question, budget=budget)
            for name, question in ASKED.items()
            for budget in BUDGETS
        }
        self.answers: dict[tuple[str, float], str] = {}
        self._bomb = body("data:image/png;base64," + base64.b64encode(png_bomb()).decode())
        self._broken = body("data:video/mp4;base64," + "AAAA" * 5000)
        self._parts = json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 10_000}]})

    def learn(self) -> None:
        """Asks everything once: what is answered later must be the same.

        Raises Failure: an address outside is not read, so that those which lead inside would say nothing.
        """
        for key, data in self.bodies.items():
            self.answers[key] = self._asked(0, data)
        outside = self.lures.url("302/" + quote(self.lures.url("clip.mp4"), safe=""))
        if self._asked(0, body(outside, ASKED[CLIP.name], budget=1.0)) != self.answers[CLIP.name, 1.0]:
            raise Failure(f"{outside} is not {CLIP.name}")

    # Those that ask.

    def asks(self, client: int, draw: random.Random) -> Status:
        key = draw.choice([*self.bodies])
        found = self._asked(client, self.bodies[key])
        if found != self.answers[key]:
            raise Failure(f"{key}: {found!r}, not {self.answers[key]!r}")
        return 200

    def _asked(self, client: int, data: bytes) -> str:
        status, text = self._answer(client, data)
        if status != 200:
            raise Failure(f"{status}: {text[:200]!r}")
        return json.loads(text)["choices"][0]["message"]["content"]

    def slow(self, client: int, draw: random.Random) -> Status:
        """A body in eight pieces during two seconds, and a stream that is taken byte by byte."""
        data = self.bodies[draw.choice([*self.bodies])].replace(b'"messages"', b'"stream": true, "messages"', 1)
        with closing(self.server.socket(client)) as connected:
            connected.sendall(head(CHAT, JSON, f"Content-Length: {len(data)}", "Connection: close"))
            size = len(data) // 8 + 1
            for begin in range(0, len(data), size):
                connected.sendall(data[begin : begin + size])
                time.sleep(0.25)
            text = b""
            while piece := connected.recv(64):
                text += piece
                time.sleep(0.005)
        if not text.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in text:
            raise Failure(f"{text[:200]!r}")
        return 200

    def goes(self, client: int, draw: random.Random) -> Status:
        return self._left(client, draw, self.bodies[draw.choice([*self.bodies])])

    def _left(self, client: int, draw: random.Random, data: bytes) -> Status:
        """Asks, and goes before the answer."""
        with closing(self.server.socket(client)) as connected:
            connected.sendall(head(CHAT, JSON, f"Content-Length: {len(data)}") + data)
            time.sleep(draw.random() * 0.3)
        return GONE

    # Hostile ones.

    def bad_json(self, client: int, draw: random.Random) -> Status:
        return self._posted(client, draw.choice([b"{" * 1000, b"[" * 100_000, b"\xff\xfe", b'{"a": NaN}']))

    def announced(self, client: int, draw: random.Random) -> Status:
        """Announces gigabytes."""
        with closing(self.server.socket(client)) as connected:
            connected.sendall(head(draw.choice([CHAT, FILES]), JSON, "Content-Length: 9999999999999"))
            return status_of(connected)

    def bomb(self, client: int, draw: random.Random) -> Status:
        """A picture that unpacks to 2.5 gigapixels."""
        return self._posted(client, self._bomb)

    def broken(self, client: int, draw: random.Random) -> Status:
        return self._posted(client, self._broken)

    def endless(self, client: int, draw: random.Random) -> Status:
        """Chunks without an end, until the server closes the connection."""
        piece = b"100000\r\n" + b" " * MIB + b"\r\n"
        with closing(self.server.socket(client)) as connected:
            connected.sendall(head(CHAT, JSON, "Transfer-Encoding: chunked"))
            try:
                for _ in range(4096):
                    connected.sendall(piece)
            except OSError:  # it is closed; what was answered before may be lost
                pass
            try:
                return status_of(connected)
            except OSError:
                return CUT

    def endless_upload(self, client: int, draw: random.Random) -> Status:
        """A file in chunks of which the end never comes: the client goes."""
        data = PART[:-2] + b"a" * 60_000
        with closing(self.server.socket(client)) as connected:
            connected.sendall(head(FILES, FORM, "Transfer-Encoding: chunked"))
            for _ in range(20):
                connected.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                data = b"a" * 60_000
                time.sleep(0.01)
        return GONE

    def parts(self, client: int, draw: random.Random) -> Status:
        """10,000 parts of a message."""
        return self._posted(client, self._parts.encode())

    def form_parts(self, client: int, draw: random.Random) -> Status:
        """10,000 files in a form."""
        return self._posted(client, PART * 10_000 + b"--x--\r\n", FILES, "multipart/form-data; boundary=x")

    def inner_address(self, client: int, draw: random.Random) -> Status:
        """Addresses of this machine by numbers, and by names that lead to it."""
        hosts = ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0x7f000001", "2130706433", "0", "10.0.0.1")
        names = (*hosts, "169.254.169.254", socket.gethostname())
        return self._posted(client, body(f"http://{draw.choice(names)}:{self.server.port}/health"))

    def redirect(self, client: int, draw: random.Random) -> Status:
        """An address outside that leads into this network, to a file, or nowhere."""
        return self._refused(client, *self.lures.redirect(draw, self.server.port))

    def inner_name(self, client: int, draw: random.Random) -> Status:
        """Names that mean an address of this network, one of them beside an address outside."""
        return self._refused(client, self.lures.url("clip.mp4", draw.choice(["inside.test", "both.test"])), REFUSED)

    def rebinding(self, client: int, draw: random.Random) -> Status:
        """A name that means an address outside, which leads to the same name, and then one of this network."""
        return self._refused(client, self.lures.url("on/1", REBINDING), REFUSED, NOT_READ)

    def dripping(self, client: int, draw: random.Random) -> Status:
        """An address outside that answers byte by byte, without an end: the client goes, and the server must not go on."""
        return self._left(client, draw, body(self.lures.url("drip")))

    def _refused(self, client: int, url: str, *says: str) -> Status:
        """Raises Failure: the error has none of these words."""
        status, text = self._answer(client, body(url))
        if status == 400 and not any(each in json.loads(text)["error"]["message"] for each in says):
            raise Failure(f"{url}: {text[:200]!r}")
        return checked(status, text)

    def paths(self, client: int, draw: random.Random) -> Status:
        folder = SAMPLES.as_posix()
        tricks = (
            "/etc/passwd",
            f"{folder}/../pyproject.toml",
            f"{folder}/%2e%2e/pyproject.toml",
            f"{folder}-/a",
            "/proc/self/environ",
        )
        return self._posted(client, body(f"file://{draw.choice(tricks)}"))

    def file_paths(self, client: int, draw: random.Random) -> Status:
        with closing(self.server.connection(client)) as connection:
            connection.request("GET", f"{FILES}/{draw.choice(['..%2f..%2fetc%2fpasswd', 'lock', '%00', 'a' * 9000])}")
            return checked(*answered(connection))

    def wrong_host(self, client: int, draw: random.Random) -> Status:
        with closing(self.server.socket(client)) as connected:
            connected.sendall(head(CHAT, JSON, "Content-Length: 2", host="example.org") + b"{}")
            return status_of(connected)

    def no_http(self, client: int, draw: random.Random) -> Status:
        with closing(self.server.socket(client)) as connected:
            connected.sendall(draw.choice([b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"A" * 100_000]))
            try:
                return status_of(connected)
            except OSError:
                return CUT

    def silent(self, client: int, draw: random.Random) -> Status:
        """Ten connections on which nothing is sent."""
        held = [self.server.socket(client) for _ in range(10)]
        time.sleep(2)
        for connected in held:
            connected.close()
        return GONE

    def _posted(self, client: int, data: bytes, path: str = CHAT, kind: str = "application/json") -> Status:
        return checked(*self._answer(client, data, path, kind))

    def _answer(self, client: int, data: bytes, path: str = CHAT, kind: str = "application/json") -> tuple[int, bytes]:
        with closing(self.server.connection(client)) as connection:
            connection.request("POST", path, data, {"Content-Type": kind})
            return answered(connection)


# What docs/server.md says of each kind, beside `BUSY`.
ASKING = {"asks": {200}, "slow": {200}, "goes": {GONE}}
HOSTILE: dict[str, set[Status]] = {
    "bad_json": {400},
    "announced": {413},
    "bomb": {400},
    "broken": {400},
    "endless": {413, CUT},
    "endless_upload": {GONE},
    "parts": {400},
    "form_parts": {400},
    "inner_address": {400},
    "inner_name": {400},
    "rebinding": {400},
    "redirect": {400},
    "dripping": {GONE},
    "paths": {400, 404},
    "file_paths": {404},
    "wrong_host": {403},
    "no_http": {400, CUT},
    "silent": {GONE},
}


@dataclass
class Counts:
    """What came of all requests: seconds by kind, statuses, and what was wrong."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    statuses: dict[str, Counter] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, status: Status, seconds: float) -> None:
        with self.lock:
            self.statuses.setdefault(kind, Counter())[status] += 1
            if status not in (ASKING | HOSTILE)[kind] | BUSY:
                self.wrong.append(f"{kind}: {status}")
            if status == 200:
                self.seconds.setdefault(kind, []).append(seconds)

    def fail(self, kind: str, problem: Exception) -> None:
        with self.lock:
            self.statuses.setdefault(kind, Counter())["wrong"] += 1
            self.wrong.append(f"{kind}: {type(problem).__name__}: {problem}")


@dataclass(frozen=True)
class State:
    """What a server takes: memory in MiB, of itself and of its children, open files, threads, processes, temporary files."""

    own: int
    children: int
    open: int
    threads: int
    processes: int
    files: int
    files_mib: float


def state(server: Server) -> State:
    processes = [server.process.pid, *children_of(server.process.pid)]
    own, *others = (resident_mib(pid) for pid in processes)
    root = Path(f"/proc/{server.process.pid}")
    files = server.files()
    size = sum(path.stat().st_size for path in files if path.exists()) / MIB
    opened = len([*(root / "fd").iterdir()])
    threads = len([*(root / "task").iterdir()])
    return State(own, sum(others), opened, threads, len(processes), len(files), size)


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        child = int(path.name)
        if parent_of(child) == pid:
            found += [child, *children_of(child)]
    return found


def parent_of(pid: int) -> int | None:
    """Return the process that started one; None where it has ended, also where nobody has asked for its exit status yet."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


def resident_mib(pid: int) -> int:
    try:
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1024
    except (OSError, TypeError):  # it has ended
        return 0


Client = Callable[[random.Random], str]  # chooses the kind of each request


def load(kinds: Kinds, clients: list[Client], seconds: float, counts: Counts, turn: int) -> State:
    """Runs clients at a time, which add to the counts. Return what the server takes at the end, while they still ask."""
    end = time.monotonic() + seconds

    def run(client: int) -> None:
        draw = random.Random(f"{client} {turn}")  # noqa: S311 (a test)
        while time.monotonic() < end:
            kind = clients[client](draw)
            begin = time.monotonic()
            try:
                status = getattr(kinds, kind)(client, draw)
            except (OSError, HTTPException, ValueError, Failure) as problem:
                counts.fail(kind, problem)
            else:
                counts.add(kind, status, time.monotonic() - begin)
            if kind != "asks":
                time.sleep(0.25)

    threads = [threading.Thread(target=run, args=(client,)) for client in range(len(clients))]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    found = state(kinds.server)
    for thread in threads:
        thread.join()
    return found


def always(kind: str) -> Client:
    return lambda draw: kind


def mixed(count: int) -> list[Client]:
    """Return clients: half of them ask, an eighth is slow, an eighth goes, the others are hostile."""
    eighth = max(1, count // 8)
    hostile = [lambda draw: draw.choice([*HOSTILE])] * (2 * eighth)
    others = [always("slow")] * eighth + [always("goes")] * eighth + hostile
    return [always("asks")] * (count - len(others)) + others


def killed(folder: Path, server: Server) -> tuple[int, int]:
    """Kills a server. Return how many files and processes are left when another one has started in its folder."""
    processes = children_of(server.process.pid)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    left = {path for path in server.files() if "evoprune-" in path.as_posix()}
    with served(folder) as other:
        still = [path for path in other.files() if path in left]
        alive = [pid for pid in processes if parent_of(pid) is not None]
    return len(still), len(alive)


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def latency(name: str, seconds: list[float], base: list[float]) -> str:
    if len(seconds) < 2:
        return row(name, len(seconds), "", "", "")
    median = statistics.median(seconds)
    ratio = median / statistics.median(base)
    return row(
        name, f"{len(seconds):,}", f"{median:.2f}", f"{statistics.quantiles(seconds, n=20)[-1]:.2f}", f"{ratio:.2f}"
    )


def tables(alone: Counts, loaded: Counts, states: dict[str, State]) -> str:
    """Return the tables of a run."""
    base = alone.seconds.get("asks", [])
    lines = [
        row("clients that ask", "answers", "median, s", "95% within, s", "median against alone"),
        "|---|--:|--:|--:|--:|",
        latency("alone", base, base),
        latency("beside the others", loaded.seconds.get("asks", []), base),
        latency("slow ones", loaded.seconds.get("slow", []), base),
        "",
        row("request", "number", "statuses"),
        "|---|--:|---|",
    ]
    for kind in (*ASKING, *HOSTILE):
        if kind in loaded.statuses:
            found = loaded.statuses[kind]
            said = ", ".join(f"{status}: {count:,}" for status, count in sorted(found.items(), key=str))
            lines.append(row(kind.replace("_", " "), f"{found.total():,}", said))
    heads = ("memory, MiB", "of children, MiB", "open files", "threads", "processes", "temporary files", "of MiB")
    lines += ["", row("", *heads), "|---|" + "--:|" * len(heads)]
    for name, each in states.items():
        lines.append(row(name, *vars(each).values()).replace(f"{each.files_mib}", f"{each.files_mib:.1f}"))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("-o", type=Path, metavar="FILE", help="also write the tables to this file")
    options = parser.parse_args(argv)
    seconds = 60 * options.minutes
    clients = mixed(options.clients)
    asking = [each for each in clients if each(random.Random(0)) == "asks"]  # noqa: S311
    alone = Counts()
    loaded = Counts()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        allowed = ("--allow-urls", "--allow-dir", str(SAMPLES))
        with luring() as lures, served(folder, *allowed, program=LURED) as server:
            kinds = Kinds(server, lures)
            kinds.learn()
            states = {"before": state(server)}
            for turn in range(TURNS):
                taken = load(kinds, asking, seconds / TURNS / 3, alone, turn)
                states.setdefault("those that ask, alone", taken)
                states[f"turn {turn + 1} of all"] = load(kinds, clients, seconds / TURNS, loaded, turn)
            time.sleep(min(10.0, seconds))
            states["10 s later"] = state(server)
            failures = server.log.read_text().count("Traceback")
            files, processes = killed(folder, server)
    text = tables(alone, loaded, states)
    text += f"\n\nNot as docs/server.md says: {len(alone.wrong + loaded.wrong)}. Failures in the log: {failures}."
    text += f" Connections to where a redirect or a name leads: {len(lures.taken)}."
    text += f" Left by the killed server after the next start: {files} files, {processes} processes.\n"
    print(text)
    for problem in (alone.wrong + loaded.wrong + lures.taken)[:20]:
        print(problem, file=sys.stderr)
    if options.o:
        options.o.write_text(text, encoding="utf-8")
    return int(bool(alone.wrong or loaded.wrong or lures.taken or failures or files or processes))


if __name__ == "__main__":
    sys.exit(main())
