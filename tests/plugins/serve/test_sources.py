"""Allowed and refused sources of videos, and the store on the disk."""

import base64
import errno
import io
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from evoprune.errors import OutOfMemory, VideoError
from evoprune_serve import public
from evoprune_serve import sources as sources_module
from evoprune_serve.errors import ApiError
from evoprune_serve.public import is_public
from evoprune_serve.sources import Address, FrameList, Sources, Uploaded, decoded
from evoprune_serve.store import BLOCK_BYTES, PREFIX, Store, private_folder
from evoprune_serve.uploads import Uploads
from tests.plugins.serve.serving import SAMPLES, picture, url_of

LIMIT = 2**20


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    return Store(folder, LIMIT)


@pytest.fixture
def uploads(store):
    return Uploads(store, 3600, LIMIT)


def uploaded(uploads: Uploads, path: Path, name: str):
    with uploads.incoming("client") as incoming:
        incoming.reserve(path.stat().st_size)
        incoming.write(path.read_bytes())
        return incoming.keep(name, "vision")


def sources(store, uploads, **how) -> Sources:
    return Sources(store, uploads, **{"urls": False, "folders": (), "limit_bytes": LIMIT} | how)


def refused(made: Sources, url: str) -> str:
    with pytest.raises(ApiError) as caught:
        made.fetch([Address(url)])
    return caught.value.message


def test_the_same_content_is_one_file_until_nobody_uses_it(store, uploads):
    made = sources(store, uploads)
    first = made.fetch([Address(url_of("square.mp4"))])
    again = made.fetch([Address(url_of("square.mp4"))])
    assert first.inputs() == again.inputs() and first.identity == again.identity
    (path,) = first.inputs()
    assert Path(path).read_bytes() == (SAMPLES / "square.mp4").read_bytes()
    assert first.paths == {path: "input 1"}
    first.close()
    assert os.path.exists(path)
    again.close()
    assert os.path.exists(path)  # kept for later questions
    store.release(store.add(bytes(LIMIT)))  # takes all the space
    assert not os.path.exists(path)


def test_there_is_no_room_for_more_than_the_limit(store):
    held = store.add(bytes(LIMIT // 2))
    with pytest.raises(ApiError, match="no room") as caught:
        store.add(b"x" * LIMIT)
    assert caught.value.status == 507 and os.path.exists(held.path)


def test_the_smallest_file_takes_a_block_of_the_disk(store, tmp_path):
    """The oldest unused files are evicted first."""
    folder = tmp_path / "store"
    held = store.add(b"held")
    contents = [store.add(str(number).encode()) for number in range(LIMIT // BLOCK_BYTES - 1)]
    with pytest.raises(ApiError, match="no room"):
        store.add(b"x")
    used = contents.pop(0)
    for content in (*contents, used):
        store.release(content)
    for number in range(500, 520):
        store.release(store.add(str(number).encode()))
    left = {path.name for path in folder.iterdir()}
    assert len(left) == LIMIT // BLOCK_BYTES
    assert {held.digest, used.digest} <= left and not left & {content.digest for content in contents[:20]}


def test_what_nobody_has_used_for_ten_minutes_leaves_the_disk(store, monkeypatch):
    old, late, held = (store.add(each) for each in (b"old", b"late", b"held"))
    begun = time.monotonic()
    store.release(old)
    monkeypatch.setattr("evoprune_serve.store.time.monotonic", lambda: begun + 300)
    store.release(late)
    monkeypatch.setattr("evoprune_serve.store.time.monotonic", lambda: begun + 601)
    store.drop_old()
    assert [os.path.exists(each.path) for each in (old, late, held)] == [False, True, True]


def test_what_is_received_has_room_until_it_is_a_content(store, tmp_path):
    (tmp_path / "a").write_bytes(bytes(LIMIT // 2))
    with store.room() as room, open(tmp_path / "a", "rb") as file:
        room.add(LIMIT // 2 + 10)  # including the form around it
        with pytest.raises(ApiError, match="no room"):
            store.add(bytes(LIMIT // 2))
        store.copy(file, room)
        store.add(b"x" * (LIMIT // 2))
    with pytest.raises(ApiError, match="no room"):
        store.add(b"y")


def test_what_cannot_be_written_leaves_nothing(store, tmp_path, monkeypatch):
    def fail(*given):
        raise OSError("no space")

    monkeypatch.setattr("evoprune_serve.store.shutil.move", fail)
    with pytest.raises(ApiError, match="cannot store"):
        store.add(b"x")
    monkeypatch.undo()
    assert not list((tmp_path / "store").iterdir())
    store.add(bytes(LIMIT))


@pytest.mark.parametrize(
    "url",
    [
        "data:video/mp4;base64,@@",
        "data:;base64,",
        "ftp://a/b",
        "nothing",
        "file:///\ud800",
        "file://[x",
        "file:///a%00b",
        "http://a/" + "x" * 9000,
    ],
)
def test_addresses_that_cannot_be_read(store, uploads, url):
    assert refused(sources(store, uploads), url)


def test_base64_is_read_as_browsers_read_it():
    """The data may be split into lines, escaped, or lack padding. Invalid characters are refused."""
    content = bytes(range(256)) + b"a"
    text = base64.b64encode(content).decode()
    for form in (
        text,
        base64.encodebytes(content).decode(),
        quote(text, safe=""),
        quote(text),
        text.rstrip("="),
        f" {text}\r\n",
    ):
        assert decoded(f"data:video/mp4;base64,{form}") == content
    assert decoded(f"data:;codecs=a; BASE64,{text}") == content
    for wrong in (text[:-4] + "a", text + "-", "%zz" + text):
        with pytest.raises(ApiError, match="not base64"):
            decoded(f"data:;base64,{wrong}")


def test_data_urls_are_read_as_browsers_write_them():
    """A recorder's URL has an unquoted comma in `codecs`. Without base64, the data is percent-encoded."""
    content = b"any bytes \xff"
    text = base64.b64encode(content).decode()
    for head in (
        "data:video/webm;codecs=vp8,opus;base64,",
        "data:video/x-matroska;codecs=avc1,opus;base64,",
        'data:video/webm;codecs="vp8,opus";base64,',
        'data:video/mp4; codecs="avc1.42E01E, mp4a.40.2"; base64,',
        'data:video/webm;codecs="vp8;base64,opus";base64,',
        "DATA:Video/WebM;CODECS=vp9;BASE64 ,",
        " data:;base64,",
        "data:video/mp4;name=a%2Cb;base64,",
        "data:video/mp4;\nbase64,",
    ):
        assert decoded(head + text) == content, head
    assert decoded(f"data:;base64,{text}#t=1,2") == content
    for head in ("data:,", "data:text/plain,", "data:video/mp4;a=b,", 'data:video/mp4;a="b,c",', "data:base64,"):
        assert decoded(head + quote(content)) == content, head
    assert decoded("data:,a;base64,AAAA") == b"a;base64,AAAA"
    for wrong in (
        "data:",
        "data:video/mp4;base64",
        "data:video/mp4;base64;" + "a" * 5000 + ",AAAA",
        "data:;base64,",
        "data:,",
    ):
        with pytest.raises(ApiError) as caught:
            decoded(wrong)
        assert caught.value.status == 400


def test_percent_signs_are_limited():
    """Decoding many of them would take much memory. In large data, those of +, / and = are few; small data may have any number."""
    content = bytes(range(256))
    text = base64.b64encode(content)
    assert decoded("data:;base64," + "".join(f"%{byte:02X}" for byte in text)) == content
    content *= 2**13
    escaped = quote(base64.b64encode(content), safe="")
    assert "%2B" in escaped and "%2F" in escaped and escaped.endswith("%3D")
    assert escaped.count("%") > sources_module.MOST_ESCAPES
    assert decoded(f"data:video/mp4;base64,{escaped}") == content
    with pytest.raises(ApiError, match="too many characters are percent-encoded") as caught:
        decoded("data:;base64," + "%41" * 100_000)
    assert caught.value.status == 400


def test_base64_without_its_head_is_no_address(store, uploads):
    with pytest.raises(ApiError, match="is not one of data:"):
        sources(store, uploads).fetch([Address("AAAA" * 9000)])


@pytest.mark.parametrize("path", ["/videos/clip.mp4", "./clip.mp4", "~/clip.mp4", "C:\\clip.mp4"])
def test_a_path_as_an_address_suggests_a_file_url(store, uploads, path):
    with pytest.raises(ApiError, match=r"such as file:///folder/video\.mp4"):
        sources(store, uploads).fetch([Address(path)])


# Lists of frames.

GREEN, RED = (0, 200, 0), (200, 0, 0)
FRAME_BYTES = 28 * 42 * 3


def frame_list(*colours: tuple[int, int, int], sizes: tuple[tuple[int, int], ...] = ()) -> FrameList:
    """Return a list of frames, each of one colour. Their sizes are (width, height)."""
    addresses = []
    for number, colour in enumerate(colours):
        content = io.BytesIO()
        Image.new("RGB", sizes[number] if sizes else (42, 28), colour).save(content, "PNG")
        addresses.append(Address("data:image/png;base64," + base64.b64encode(content.getvalue()).decode()))
    return FrameList(tuple(addresses), 1.0, None)


def test_the_lists_of_frames_of_a_request_have_a_limit_together(store, uploads, monkeypatch):
    fetched = sources(store, uploads).fetch([frame_list(GREEN, RED), Address(url_of("square.mp4")), frame_list(RED)])
    monkeypatch.setattr(sources_module, "FRAMES_BYTES", 3 * FRAME_BYTES)
    first, path, second = fetched.inputs()
    assert isinstance(path, str)
    for video, colours in ((first, (GREEN, RED)), (second, (RED,))):
        assert video.held.shape == (len(colours), 28, 42, 3)
        assert all(np.all(frame == colour) for frame, colour in zip(video.held, colours, strict=True))
    monkeypatch.setattr(sources_module, "FRAMES_BYTES", 3 * FRAME_BYTES - 1)
    with pytest.raises(ApiError, match="the lists of frames have more than") as caught:
        fetched.inputs()
    assert caught.value.status == 400
    assert sources(store, uploads).fetch([frame_list(GREEN, RED)]).inputs()


def test_frames_take_a_quarter_of_the_available_memory_at_most(store, uploads, monkeypatch):
    fetched = sources(store, uploads).fetch([frame_list(GREEN, RED)])
    available = 8 * FRAME_BYTES
    monkeypatch.setattr(sources_module, "Host", lambda: SimpleNamespace(available_memory=lambda: available))
    assert fetched.inputs()
    available = None  # unknown
    assert fetched.inputs()
    available = 8 * FRAME_BYTES - 1
    with pytest.raises(OutOfMemory, match="the frames take too much memory"):
        fetched.inputs()


@pytest.mark.parametrize("size", [(28, 42), (84, 28), (42, 30)])
def test_frames_have_one_size(store, uploads, size):
    fetched = sources(store, uploads).fetch([frame_list(GREEN, RED, GREEN, sizes=((42, 28), (42, 28), size))])
    with pytest.raises(ApiError, match="frame 3 of input 1 has a different size") as caught:
        fetched.inputs()
    assert caught.value.status == 400


def test_files_are_read_below_the_folders_that_are_allowed_alone(store, uploads, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a b.mp4").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    (inside / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(inside / "pipe")
    made = sources(store, uploads, folders=[inside])
    fetched = made.fetch([Address(f"file://{inside}/a%20b.mp4")])
    (path,) = fetched.inputs()
    assert Path(path).read_bytes() == b"x" and fetched.paths == {path: f"file://{inside}/a%20b.mp4"}
    (inside / "inner").symlink_to(inside / "a b.mp4")
    assert made.fetch([Address(f"file://{inside}/inner")]).identity == fetched.identity
    fetched.close()
    for wrong in (
        f"{inside}/../secret", f"{inside}/%2e%2e/secret", f"{inside}/link", f"{inside}/pipe", f"{inside}", f"{inside}/none",
        "/etc/passwd", f"{inside}/a%00b", "", "/" + "x" * 5000, "//etc/passwd", f"other.host{inside}/a%20b.mp4",
    ):  # fmt: skip
        assert "not a file below" in refused(made, f"file://{wrong}")
    assert "not a file below" in refused(sources(store, uploads), f"file://{inside}/a%20b.mp4")


def test_loops_of_links_are_not_found(store, uploads, tmp_path):
    """Inside a folder and outside, so that clients learn nothing about other files."""
    inside = tmp_path / "inside"
    inside.mkdir()
    for folder in (inside, tmp_path):
        (folder / "loop").symlink_to(folder / "loop")
        (folder / "there").symlink_to(folder / "back")
        (folder / "back").symlink_to(folder / "there")
    made = sources(store, uploads, folders=[inside])
    for folder in (inside, tmp_path):
        for name in ("loop", "loop/a.mp4", "there"):
            url = f"file://{folder}/{name}"
            for source in (Address(url), FrameList((Address(url),), 1.0, None)):
                with pytest.raises(ApiError) as caught:
                    made.fetch([source])
                assert caught.value.message == f"{url} is not a file below a folder of --allow-dir"
                assert (caught.value.status, caught.value.code) == (404, "not_found")


def test_a_file_that_is_replaced_by_a_link_is_not_followed(store, uploads, tmp_path, monkeypatch):
    """This holds between checking the path and opening the file, and afterwards. It also holds for parent folders."""
    inside = tmp_path / "inside"
    (inside / "folder").mkdir(parents=True)
    for folder in (inside / "folder", tmp_path):
        (folder / "a.mp4").write_bytes(folder.name.encode())
    made = sources(store, uploads, folders=[inside])
    url = f"file://{inside}/folder/a.mp4"
    fetched = made.fetch([Address(url)])
    frames = made.fetch([FrameList((Address(url),), 1.0, None)])
    resolve = Path.resolve

    def resolved(self, *given):
        real = resolve(self, *given)
        swap()
        return real

    def swap_file():
        (inside / "folder" / "a.mp4").unlink()
        (inside / "folder" / "a.mp4").symlink_to(tmp_path / "a.mp4")

    def swap_folder():
        (inside / "folder").rename(tmp_path / "away")
        (inside / "folder").symlink_to(tmp_path)

    monkeypatch.setattr(Path, "resolve", resolved)
    for swap in (swap_file, swap_folder):
        with pytest.raises(ApiError, match="not a file below") as caught:
            made.fetch([Address(url)])
        assert (caught.value.status, caught.value.code) == (404, "not_found")
        monkeypatch.undo()
        if swap is swap_file:
            (inside / "folder" / "a.mp4").unlink()
            (inside / "folder" / "a.mp4").write_bytes(b"again")
        monkeypatch.setattr(Path, "resolve", resolved)
    for each in (*fetched.inputs(), *(file.path for file in frames._inputs[0].files)):
        assert Path(each).read_bytes() == b"folder"
    files = len(os.listdir("/proc/self/fd"))
    fetched.close()
    frames.close()
    assert len(os.listdir("/proc/self/fd")) == files - 1 and not list((tmp_path / "store").glob("open-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_requests_about_the_same_file_share_a_path(store, uploads, tmp_path):
    """One request's reader may serve another request, so the path must outlive the request that came first."""
    (tmp_path / "a.mp4").write_bytes(b"old")
    (tmp_path / "b.mp4").hardlink_to(tmp_path / "a.mp4")
    made = sources(store, uploads, folders=[tmp_path])
    files = len(os.listdir("/proc/self/fd"))
    first, second = (made.fetch([Address(f"file://{tmp_path}/{name}")]) for name in ("a.mp4", "b.mp4"))
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").rename(tmp_path / "a.mp4")
    third = made.fetch([Address(f"file://{tmp_path}/a.mp4")])
    first.close()
    assert second.inputs() == first.inputs() != third.inputs()
    assert [Path(fetched.inputs()[0]).read_bytes() for fetched in (second, third)] == [b"old", b"new"]
    assert list(second.paths.values()) == [f"file://{tmp_path}/b.mp4"]
    second.close()
    third.close()
    assert len(os.listdir("/proc/self/fd")) == files and not list((tmp_path / "store").glob("open-*"))


def test_too_many_open_files_are_429(store, uploads, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")
    made = sources(store, uploads, folders=[tmp_path])

    def fail(*_, **__):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "open", fail)
    monkeypatch.setattr(os, "supports_dir_fd", {fail})
    with pytest.raises(ApiError) as caught:
        made.fetch([Address(f"file://{tmp_path}/a")])
    assert caught.value.status == 429


class _Web(BaseHTTPRequestHandler):
    """Serves a sample, redirects to the URL in a path, and sends endless headers."""

    asked = 0

    def do_GET(self):
        type(self).asked += 1
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        if self.path == "/drip":
            with suppress(ConnectionError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                for _ in range(1000):
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            return
        content = (SAMPLES / "square.mp4").read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "video/mp4")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def web():
    _Web.asked = 0
    server = HTTPServer(("127.0.0.1", 0), _Web)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_addresses_on_the_web_are_read_if_they_are_allowed(store, uploads, monkeypatch):
    monkeypatch.setattr(public, "is_public", lambda address: True)
    with web() as host:
        # Pretends that the server is on another machine.
        monkeypatch.setattr(socket.socket, "getsockname", lambda self: ("198.51.100.1", 1))
        assert "--allow-urls" in refused(sources(store, uploads), f"http://{host}/a.mp4")
        made = sources(store, uploads, urls=True)
        fetched = made.fetch([Address(f"http://user:secret@{host}/a.mp4")])
        assert fetched.names == [f"http://{host}/a.mp4"]
        assert fetched.identity == made.fetch([Address(f"http://user:secret@{host}/a.mp4")]).identity
        assert _Web.asked == 1  # the second question about it
        small = sources(store, uploads, urls=True, limit_bytes=1000)
        with pytest.raises(VideoError, match="more than"):
            small.fetch([Address(f"http://{host}/a.mp4")])


def test_a_download_that_takes_too_long_ends(store, uploads, monkeypatch):
    monkeypatch.setattr(public, "is_public", lambda address: True)
    monkeypatch.setattr(sources_module, "LONGEST_S", 0.3)
    with web() as host:
        monkeypatch.setattr(socket.socket, "getsockname", lambda self: ("198.51.100.1", 1))
        with pytest.raises(VideoError, match="takes more than"):
            sources(store, uploads, urls=True).fetch([Address(f"http://{host}/drip")])


def test_a_download_without_room_ends(store, uploads, monkeypatch):
    monkeypatch.setattr(public, "is_public", lambda address: True)
    held = store.add(bytes(LIMIT - BLOCK_BYTES))
    with web() as host:
        monkeypatch.setattr(socket.socket, "getsockname", lambda self: ("198.51.100.1", 1))
        monkeypatch.setattr(Store, "add_file", None)  # it must not get this far
        made = sources(store, uploads, urls=True)
        assert "no room" in refused(made, f"http://{host}/a.mp4")
        monkeypatch.undo()
    store.release(held)
    store.add(b"x" * LIMIT)


def test_addresses_of_this_network_are_not_read(store, uploads, monkeypatch):
    """Neither by number, in any notation, nor by name, nor after a redirect; and no request is sent to them."""
    made = sources(store, uploads, urls=True)
    with web() as host:
        port = host.partition(":")[2]
        for name in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"):
            with pytest.raises(VideoError, match=r"not on the public internet|cannot download"):
                made.fetch([Address(f"http://{name}:{port}/a.mp4")])
        found = socket.getaddrinfo("127.0.0.1", int(port), type=socket.SOCK_STREAM)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)  # a public name with a private address
        with pytest.raises(VideoError, match="not on the public internet"):
            made.fetch([Address("http://videos.example.org/a.mp4")])
        assert _Web.asked == 0


def test_a_redirect_into_this_network_is_not_followed(store, uploads, monkeypatch):
    made = sources(store, uploads, urls=True)
    with web() as host:
        port = host.partition(":")[2]
        monkeypatch.setattr(socket.socket, "getsockname", lambda self: ("198.51.100.1", 1))
        monkeypatch.setattr(public, "is_public", lambda address: address == "127.0.0.1")
        with pytest.raises(VideoError, match="not on the public internet"):
            made.fetch([Address(f"http://{host}/to/http://[::1]:{port}/a.mp4")])
        with pytest.raises(VideoError, match="only http and https are read"):
            made.fetch([Address(f"http://{host}/to/file:///etc/passwd")])


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("::1", False), ("::ffff:127.0.0.1", False), ("fe80::1", False),
        ("fec0::1", False),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("224.0.0.1", False), ("0.0.0.0", False), ("::", False),
        ("255.255.255.255", False), ("fc00::1", False), ("ff02::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


def test_uploads_go_when_they_are_deleted_or_old(store, uploads, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(picture())
    kept = uploaded(uploads, tmp_path / "a", "../../x/clip\n.mp4")
    assert kept.name == "clip?.mp4" and kept.record()["bytes"] == len(picture())
    fetched = sources(store, uploads).fetch([Uploaded(kept.id)])
    assert fetched.paths == {kept.content.path: "clip?.mp4"}
    uploads.delete(kept.id)
    with pytest.raises(ApiError, match="no file"):
        uploads.get(kept.id)
    store.release(store.add(bytes(LIMIT - BLOCK_BYTES)))
    assert os.path.exists(kept.content.path)  # while a question uses it
    fetched.close()
    assert not os.path.exists(kept.content.path)
    old = uploaded(uploads, tmp_path / "a", "a")
    monkeypatch.setattr("evoprune_serve.uploads.time.time", lambda: old.expires + 1)
    with pytest.raises(ApiError, match="no file"):
        uploads.get(old.id)
    assert not os.path.exists(old.content.path)


HOLD = """
import time
from evoprune_serve.store import private_folder
with private_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_what_a_killed_server_leaves_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    paths = os.pathsep.join(sys.path)
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": paths}
    holder = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True)
    left = holder.stdout.readline().strip()
    with private_folder() as own:
        assert own.stat().st_mode & 0o777 == 0o700
        # Its process is alive.
        assert {each.name for each in tmp_path.glob(f"{PREFIX}*")} == {own.name, os.path.basename(left)}
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert os.path.isdir(left)
    with private_folder():
        assert not os.path.exists(left)
    assert not list(tmp_path.iterdir())
