"""Inputs from the web, served by a local server; nothing goes online."""

import contextlib
import gzip
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from PIL import Image

import evoprune
from evoprune.errors import UsageError, VideoError
from evoprune.video import download, downloaded, probe
from tests.cli.conftest import ROOT
from tests.video.files import numbered_frames, write_video

QUESTION = "What is there?"
QUICK = ("-m", "demo", "-n", "1", "--frames", "4")
LONGEST_S = 60.0  # maximum duration of an answer of the server, in seconds


class Web(http.server.BaseHTTPRequestHandler):
    """Answer according to the last part of the path, and record the requests."""

    clip = b""
    visits: list[tuple[str, str | None]] = []  # noqa: RUF012 (of all requests)
    over = threading.Event()  # set after the last test

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.visits.append((self.path, self.headers.get("Authorization")))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, "_" + name.partition(".")[0], self._missing)()

    def log_message(self, *_) -> None:
        pass

    def _begin(self, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _whole(self, content: bytes, kind: str = "video/mp4") -> None:
        self._begin(Content_Length=str(len(content)), Content_Type=kind)
        self.wfile.write(content)

    def _clip(self) -> None:
        self._whole(self.clip)

    def _picture(self) -> None:
        content = io.BytesIO()
        Image.new("RGB", (84, 84), "red").save(content, "PNG")
        self._whole(content.getvalue(), "image/png")

    def _missing(self) -> None:
        self._begin(404, Content_Length="0")

    def _secret(self) -> None:
        if self.headers.get("Authorization"):
            self._clip()
        else:
            self._begin(401, WWW_Authenticate='Basic realm="x"', Content_Length="0")

    def _busy(self) -> None:
        self._begin(503, Content_Length="0")

    def _there(self) -> None:
        self._begin(302, Location="/clip.mp4", Content_Length="0")

    def _elsewhere(self) -> None:
        self._begin(302, Location=self.path.partition("?")[2], Content_Length="0")

    def _circle(self) -> None:
        self._begin(302, Location=self.path + "?x", Content_Length="0")

    def _talkative(self) -> None:
        """Redirect with a body that lasts as long as the client reads it."""
        self._begin(302, Location="/clip.mp4")
        for _ in range(64):
            self.wfile.write(bytes(2**20))
        self.visits.append(("all was read", None))

    def _endless(self) -> None:
        self._begin(Content_Type="video/mp4")
        end = time.monotonic() + LONGEST_S
        while time.monotonic() < end:
            self.wfile.write(bytes(2**16))

    def _huge(self) -> None:
        self._begin(Content_Type="video/mp4", Content_Length=str(2**50))

    def _slow(self) -> None:
        """Send a little now and then."""
        self._begin(Content_Type="video/mp4")
        end = time.monotonic() + LONGEST_S
        while time.monotonic() < end and not self.over.wait(0.1):
            self.wfile.write(self.clip[:10])
            self.wfile.flush()

    def _stalling(self) -> None:
        self._begin(Content_Length=str(len(self.clip)))
        self.wfile.write(self.clip[:10])
        self.over.wait(LONGEST_S)

    def _silent(self) -> None:
        self.over.wait(LONGEST_S)

    def _short(self) -> None:
        self._begin(Content_Length=str(len(self.clip) + 10))
        self.wfile.write(self.clip)

    def _chunked(self) -> None:
        self._begin(Transfer_Encoding="chunked")
        self.wfile.write(b"100\r\n" + self.clip[:50])

    def _wrong(self) -> None:
        self._begin(Content_Length="many")
        self.wfile.write(self.clip)

    def _nothing(self) -> None:
        self._whole(b"")

    def _page(self) -> None:
        self._whole(b"<html>a film</html>", "text/html; charset=utf-8")

    def _watch(self) -> None:
        self._whole(b"\n<!DOCTYPE html><title>a film</title>", "application/octet-stream")

    def _playlist(self) -> None:
        self._whole(b"#EXTM3U\n#EXTINF:3,\na.ts\n#EXT-X-ENDLIST\n", "application/x-mpegurl")

    def _manifest(self) -> None:
        self._whole(b'<?xml version="1.0"?>\n<MPD type="static"></MPD>', "application/dash+xml")

    def _text(self) -> None:
        self._whole(b"some text", "text/plain")

    def _packed(self) -> None:
        self._begin(Content_Encoding="gzip", Content_Type="video/mp4")
        self.wfile.write(gzip.compress(self.clip))

    def _encoded(self) -> None:
        """Name an encoding that does not exist (S3, Azure and aws-cli store such names), or that the content does not have."""
        self._begin(Content_Encoding=self.path.partition("?")[2], Content_Length=str(len(self.clip)))
        self.wfile.write(self.clip)

    def _typed(self) -> None:
        self._whole(self.clip, self.path.partition("?")[2])

    def _login(self) -> None:
        self._begin(302, Set_Cookie="a=b; Path=/", Location="/members.mp4", Content_Length="0")

    def _members(self) -> None:
        if self.headers.get("Cookie") == "a=b":
            self._clip()
        else:
            self._begin(302, Location="/login", Content_Length="0")

    def _hinted(self) -> None:
        self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x.css>\r\n\r\n")
        self._clip()


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """The base URL of the server."""
    folder = tmp_path_factory.mktemp("web")
    Web.clip = write_video(folder / "a.mp4", numbered_frames(20)).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Web.over.set()
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture(autouse=True)
def spool(tmp_path, monkeypatch):
    """The folder for temporary files, which must be empty in the end."""
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    Web.visits.clear()
    yield folder
    assert not list(folder.iterdir())


GOOD = [
    "clip.mp4",
    "there",
    "clip.mp4?a=b c&d=ä",
    "a b/ä/clip",
    "encoded?",
    "encoded?UTF-8",
    "encoded?Identity",
    "encoded?none",
    "encoded?aws-chunked",
    "typed?text/html",
    "typed?",
    "members.mp4",
    "hinted.mp4",
]


@pytest.mark.parametrize("name", GOOD)
def test_a_file_on_the_web_is_the_file(web, name):
    seen = []
    with downloaded(f"{web}/{name}", progress=lambda done, total: seen.append((done, total))) as path:
        assert open(path, "rb").read() == Web.clip  # noqa: SIM115
        assert probe(path).frames_total == 20
    assert seen[-1] == (len(Web.clip), len(Web.clip))


def test_a_file_that_is_sent_packed_is_unpacked(web):
    with downloaded(f"{web}/packed.mp4") as path, open(path, "rb") as file:
        assert file.read() == Web.clip


def test_a_host_with_other_letters_than_ascii(web, monkeypatch):
    asked = []
    found = socket.getaddrinfo("127.0.0.1", int(web.rpartition(":")[2]), type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or found)
    with downloaded(web.replace("127.0.0.1", "bücher.example") + "/clip.mp4") as path, open(path, "rb") as file:
        assert file.read() == Web.clip
    assert asked == ["xn--bcher-kva.example"]
    with pytest.raises(VideoError, match="cannot download"), downloaded("http://bücher..example/a.mp4"):
        pass


def test_what_progress_raises_ends_a_download(web):
    def give_up(done: int, total: int) -> None:
        if done:
            raise RuntimeError

    start = time.monotonic()
    with pytest.raises(RuntimeError), downloaded(f"{web}/slow.mp4", progress=give_up):
        pass
    assert time.monotonic() - start < LONGEST_S / 2


def test_the_body_of_a_redirect_is_not_read(web):
    with downloaded(f"{web}/talkative") as path:
        assert open(path, "rb").read() == Web.clip  # noqa: SIM115
    assert [path for path, _ in Web.visits] == ["/talkative", "/clip.mp4"]


BROKEN = [
    ("gone.mp4", "404", "check the address"),
    ("secret.mp4", "401", "login"),
    ("busy.mp4", "503", "later"),
    ("elsewhere?file:///etc/passwd", "of file:, and only http and https are read", "address"),
    ("elsewhere?ftp://127.0.0.1/a.mp4", "of ftp:, and only http and https are read", "address"),
    ("elsewhere?data:video/mp4,x", "of data:, and only http and https are read", "address"),
    ("elsewhere?http:a.mp4", "redirects to an invalid address", "address"),
    ("elsewhere?http://a:b/", "redirects to an invalid address", "address"),
    ("circle", "redirects more than 10 times", "address"),
    ("huge.mp4", "larger than 1 MiB", "yt-dlp"),
    ("endless.mp4", "larger than 1 MiB", "yt-dlp"),
    ("slow.mp4", "took longer than", "yt-dlp"),
    ("stalling.mp4", "stalled after 10 bytes", "again"),
    ("silent.mp4", "no answer for", "later"),
    ("short.mp4", "was interrupted", "again"),
    ("chunked.mp4", "was interrupted", "again"),
    ("nothing.mp4", "is empty", "address"),
    ("page", "is a web page", "yt-dlp"),
    ("watch?v=1", "is a web page", "yt-dlp"),
    ("playlist.m3u8", "is a playlist", "evoprune watch URL"),
    ("manifest.mpd", "is a playlist", "evoprune watch URL"),
    ("encoded?gzip", "is not encoded as the server states", "yt-dlp"),
    ("wrong.mp4", "cannot download", "check the address"),
]


@pytest.mark.few(8)
@pytest.mark.parametrize(("name", "says", "hint"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_what_a_server_does_wrong_is_said(web, monkeypatch, name, says, hint):
    """The limits of time are short only where the server exceeds them."""
    monkeypatch.setattr(download, "TIMEOUT_S", {"silent.mp4": 0.5, "stalling.mp4": 2.0}.get(name, 20.0))
    monkeypatch.setattr(download, "MAX_BYTES", 2**20)
    monkeypatch.setattr(download, "MAX_S", 0.8 if name == "slow.mp4" else LONGEST_S)
    start = time.monotonic()
    with pytest.raises(VideoError) as caught, downloaded(f"{web}/{name}"):
        pass
    assert says in caught.value.message and f"{web}/{name.partition('?')[0]}" in caught.value.message
    assert hint in caught.value.hint, str(caught.value)
    assert time.monotonic() - start < LONGEST_S / 2


@pytest.mark.parametrize("url", ["http://", "http://[", "http://a:b/", "http://127.0.0.1:1/a.mp4", "http://a\nb/c"])
def test_addresses_that_nobody_answers_are_errors_of_the_input(url):
    with pytest.raises(VideoError, match="cannot download") as caught, downloaded(url):
        pass
    assert caught.value.hint and "protocol" not in caught.value.message


@pytest.mark.parametrize(
    ("proxy", "says"),
    [("socks5://127.0.0.1:1", "needs the package socksio"), ("http://127.0.0.1:1", "cannot download")],
)
def test_a_proxy_that_cannot_be_used_is_said(web, monkeypatch, proxy, says):
    monkeypatch.setenv("all_proxy", proxy)
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(VideoError, match=says) as caught, downloaded(f"{web}/clip.mp4"):
        pass
    assert caught.value.hint and not Web.visits


def test_a_password_is_used_and_not_printed(web, cli):
    url = web.replace("//", "//me:p%40ss@") + "/secret.mp4"
    result = cli("ask", url, QUESTION, *QUICK, "--json")
    assert result.code == 0 and result.record["video"]["path"] == f"{web}/secret.mp4"
    assert Web.visits == [("/secret.mp4", "Basic bWU6cEBzcw==")]
    failed = cli("ask", url.replace("secret", "gone"), QUESTION, *QUICK, "--json")
    assert failed.code == 3 and failed.record["video"]["path"] == f"{web}/gone.mp4"
    assert not any("p%40ss" in text or "p@ss" in text for text in (result.out, result.err, failed.out, failed.err))


def test_ask_names_the_address(web, cli):
    result = cli("ask", f"{web}/clip.mp4", QUESTION, *QUICK, "--json")
    assert (result.code, result.record["video"]["path"]) == (0, f"{web}/clip.mp4")
    several = cli("ask", f"{web}/clip.mp4", "samples/square.mp4", f"{web}/picture.png", QUESTION, *QUICK, "--json")
    names = [facts["path"] for facts in several.record["inputs"]]
    assert names == [f"{web}/clip.mp4", "samples/square.mp4", f"{web}/picture.png"]
    text = cli("ask", f"{web}/text", QUESTION, *QUICK)
    assert text.code == 3 and f"{web}/text is not a video" in text.err


def test_inspect_reads_an_address(web, cli):
    assert cli("inspect", f"{web}/clip.mp4", "--json").record["video"]["path"] == f"{web}/clip.mp4"


@pytest.mark.parametrize("command", ["ask", "inspect", "profile"])
def test_offline_asks_nobody(web, cli, command):
    words = (f"{web}/clip.mp4", *((QUESTION, *QUICK) if command == "ask" else ()))
    result = cli(command, *words, "--offline")
    assert result.code == 2 and "offline" in result.err and "hint: leave out --offline" in result.err
    assert not Web.visits


def test_batch_downloads_each_row(web, cli, tmp_path):
    clip = str(ROOT / "samples/square.mp4")
    rows = [f"{web}/clip.mp4", f"{web}/gone.mp4", clip, f"{web}/page"]
    lines = [json.dumps({"video": row, "question": QUESTION}) + "\n" for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    asked = ("batch", "--from", tmp_path / "rows.jsonl", "-o", tmp_path / "out.jsonl", *QUICK)
    assert cli(*asked).code == 6
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    errors = {record["video"]["path"]: record["error"] and record["error"]["message"] for record in records}
    assert errors[f"{web}/clip.mp4"] is None and errors[clip] is None
    Web.visits.clear()
    assert cli(*asked, "--resume").code == 6
    assert sorted(path for path, _ in Web.visits) == ["/gone.mp4", "/page"]
    assert "404" in errors[f"{web}/gone.mp4"] and "web page" in errors[f"{web}/page"]
    named = cli("batch", f"{web}/clip.mp4", "-Q", QUESTION, "-o", "-", *QUICK)
    assert named.code == 0 and named.record["video"]["path"] == f"{web}/clip.mp4"
    offline = cli("batch", f"{web}/clip.mp4", "-Q", QUESTION, "-o", "-", *QUICK, "--offline")
    assert offline.code == 6 and "offline" in offline.record["error"]["message"]


def test_an_evaluation_downloads_nothing(web, cli, tmp_path):
    row = {"video": f"{web}/clip.mp4", "question": QUESTION, "answer": "green"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    result = cli("eval", "--data", tmp_path / "rows.jsonl", "-m", "demo")
    assert result.code == 2 and "does not read URLs" in result.err
    tuned = cli("tune", f"{web}/clip.mp4", "-m", "demo")
    assert tuned.code == 3 and "yt-dlp" in tuned.err
    assert not Web.visits


def test_python_takes_addresses(web):
    qa = evoprune.VideoQA.load("demo", budget=0.5, threads=1)
    seen = []
    encoded = qa.encode([f"{web}/clip.mp4", f"{web}/picture.png"], progress=lambda *step: seen.append(step))
    assert ("download", len(Web.clip), len(Web.clip)) in seen
    answer = encoded.ask(QUESTION, max_new_tokens=1)
    str(answer)
    assert [facts.path for facts in answer.report.inputs] == [f"{web}/clip.mp4", f"{web}/picture.png"]
    with pytest.raises(VideoError, match="404"):
        qa.ask(f"{web}/gone", QUESTION)
    offline = evoprune.VideoQA.load("demo", offline=True, threads=1)
    with pytest.raises(UsageError, match="offline"):
        offline.encode(f"{web}/clip.mp4")
    with pytest.raises(UsageError, match="offline"):
        evoprune.processor_inputs("demo", f"{web}/clip.mp4", QUESTION, offline=True)


def test_a_file_of_such_a_name_comes_first(web, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / web.replace("//", "/")
    folder.mkdir(parents=True)
    (folder / "clip.mp4").write_bytes(Web.clip)
    qa = evoprune.VideoQA.load("demo", budget=0.5, threads=1)
    qa.encode(f"{web}/clip.mp4")
    assert not Web.visits


def test_a_full_disk_is_said(web, spool, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(VideoError, match="cannot store http") as caught, downloaded(f"{web}/clip.mp4"):
        pass
    assert "TMPDIR" in caught.value.hint


@pytest.mark.few(1)
@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_signal_removes_what_was_downloaded(web, spool, how, code):
    command = [sys.executable, "-m", "evoprune_cli", "ask", f"{web}/slow.mp4", QUESTION, *QUICK]
    environment = os.environ | {"TMPDIR": str(spool)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 30
        while not list(spool.glob("evoprune-*/input")) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(how)
        said = process.stderr.read()
    assert process.returncode == code and b"Traceback" not in said
