"""Tests of unusual inputs: odd file names, links, devices, pipes, playlists, and standard input."""

import io
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading

import pytest

from evoprune.errors import UsageError, VideoError
from evoprune.video.frames import CHUNK_BYTES, local_file, probe, read_chunks, scan
from tests.decoders import DECODERS, EVERY
from tests.video.files import numbered_frame, numbered_frames, numbers, write_image, write_video

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other names, and no pipes and devices")
NAMES = [
    "two words .mp4", 'it\'s "so".mp4', "new\nline.mp4", "Überraschung 视频 🎬.mp4", "$HOME `ls`;.mp4",
    "-", "-i.mp4", "--help", "100%.mp4", "f%d.mp4", "f%03d.png", "*?[a]{b}.mp4", "back\\slash.mp4", "12:30:00.mp4", "file:a.mp4",
    "concat:a.mp4|b.mp4", "pipe:1", "pipe:", "http:/a.mp4", "http:a.mp4", "subfile,,start,0,end,9,,:a.mp4",
    "data:video;base64,AAAA", "crypto:a", "a.m3u8", "a.ffconcat", "a.sdp", os.fsdecode(b"\xff\xfe.mp4"),
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.few(6)
@pytest.mark.parametrize("decoder", EVERY)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_nothing_but_a_name(name, decoder, here):
    video = write_video(here / "plain.mp4", numbered_frames(9)[3:6])
    write_video(here / "f1.mp4", numbered_frames(2))  # a pattern would match this file
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    try:
        video.rename(here / name)
    except OSError:
        pytest.skip("this file system wants text")
    for path in (name, str(here / name)):
        info = probe(path)
        assert info.path == path
        assert numbers(info, [0.05, 0.25], decoder=decoder) == [3, 5]


NO_FILES = {  # from a name to the expected error message
    **dict.fromkeys(["https://example.org/a.mp4", "rtsp://a/b", "file:///a.mp4"], "URL"),
    **dict.fromkeys(["pipe:1", "http:/a.mp4", "concat:a|b", "a/../../nowhere.mp4"], "no such file"),
    **dict.fromkeys(["pipe.mp4", "socket.mp4", "/dev/zero", "/dev/null", "/dev/full", "/dev/tty"], "not a regular file"),
    "nul\0byte.mp4": "is not a valid file name", "images": "no images", "dangling.mp4": "a link to a file that does not exist",
    **dict.fromkeys(["loop.mp4", "loop.mp4/a", "in/itself", "a.mp4/b.mp4", "x" * 300, "/proc/self/mem", "/sys", "hole.mp4"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder that contains things that are not video files, and a subfolder of things that are not images."""
    folder = tmp_path_factory.mktemp("odd")
    write_video(folder / "a.mp4", numbered_frames(3))
    for name, target in (("loop.mp4", "loop2.mp4"), ("loop2.mp4", "loop.mp4"), ("dangling.mp4", "missing.mp4")):
        (folder / name).symlink_to(target)
    (folder / "in").mkdir()
    (folder / "in" / "itself").symlink_to("itself")
    images = folder / "images"
    images.mkdir()
    os.mkfifo(folder / "pipe.mp4")
    os.mkfifo(images / "1.png")
    (images / "2.png").symlink_to("/dev/zero")
    (images / "3.png").symlink_to("3.png")
    (folder / "hole.mp4").touch()
    os.truncate(folder / "hole.mp4", 2**40)  # zeros that use no disk space
    return folder


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_neither_fetched_nor_waited_for(name, odd, monkeypatch):
    monkeypatch.chdir(odd)
    with socket.socket(socket.AF_UNIX) as listening:
        if name == "socket.mp4":
            listening.bind(name)
        for use in (probe, scan):
            with pytest.raises(VideoError, match=NO_FILES[name]) as caught:
                use(name)
            assert caught.value.exit_code == 3 and caught.value.hint
            assert name[:90] in caught.value.message or "\0" in name


def test_links_are_followed_to_videos_and_images(here):
    (here / "link.mp4").symlink_to(write_video(here / "a.mp4", numbered_frames(3)))
    (here / "folder").symlink_to(here)
    assert numbers(probe("link.mp4"), [0.25]) == numbers(probe("folder/folder/link.mp4"), [0.25]) == [2]
    assert probe("link.mp4").path == "link.mp4"
    (here / "hole.png").touch()
    os.truncate(here / "hole.png", 2**40)  # damaged
    with pytest.raises(VideoError, match="can be decoded"):
        probe(here)
    write_image(here / "4.png", numbered_frame(44))
    (here / "5.png").symlink_to("4.png")
    assert numbers(probe(here), [0.0, 0.5]) == [44, 44] and probe(here).frames_total == 3


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(here):
    write_video(here / "a.mp4", numbered_frames(3)).chmod(0)
    (here / "closed").mkdir(0)
    for name in ("a.mp4", "closed/a.mp4", "closed"):
        with pytest.raises(VideoError, match="Permission denied"):
            probe(name)


@pytest.fixture
def server():
    """The port of a server, and a list that gets an entry for each connection."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            while True:
                try:
                    calls.append(listening.accept()[0].close())
                except OSError:
                    return

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield listening.getsockname()[1], calls
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{target}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile '{target}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "mpd": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT4S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="9"><BaseURL>{target}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>\n",
}


@pytest.mark.few(10)
@pytest.mark.parametrize("ending", ["own", "mp4"])
@pytest.mark.parametrize(
    "target", ["secret.ts", "{here}/secret.ts", "file:{here}/secret.ts", "http://127.0.0.1:{port}/a.ts"]
)
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_are_not_followed(kind, target, ending, here, server):
    """A playlist is not followed even if it replaces a video that has already been probed."""
    port, calls = server
    write_video(here / "secret.ts", numbered_frames(3))
    path = here / f"list.{kind if ending == 'own' else ending}"
    info = probe(write_video(here / "a.mp4", numbered_frames(3)).rename(path)) if ending == "mp4" else None
    path.write_text(PLAYLISTS[kind].format(target=target.format(here=here, port=port), port=port))
    again = [lambda _, decoder=decoder: list(read_chunks(info, [0.0], decoder=decoder)) for decoder in DECODERS]
    for use in (probe, scan, *(again if info else ())):
        with pytest.raises(VideoError) as caught:
            use(path)
        assert (caught.value.exit_code, bool(caught.value.hint)) == (3, True)
    assert not calls


def test_a_working_folder_that_is_gone(tmp_path, monkeypatch):
    video = write_video(tmp_path / "a.mp4", numbered_frames(3))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert numbers(probe(video), [0.25]) == [2]
    with pytest.raises(VideoError, match=r"a\.mp4"):
        probe("a.mp4")


@pytest.mark.parametrize("source", ["video.mp4", "./-", "--", "", "rtsp://x", "folder/"])
def test_paths_pass_unchanged_and_nothing_is_read(source, spool):
    with local_file(source, stdin=None) as path:
        assert path == source and not list(spool.iterdir())


class Endless(io.RawIOBase):
    """A stream of zeros that records the size of each read. If `problem` is given, the third read raises it."""

    def __init__(self, chunks, problem=None):
        self.left, self.problem, self.asked = chunks, problem, []

    def read(self, size=-1):
        if self.problem and len(self.asked) == 2:
            raise self.problem
        self.asked.append(size)
        self.left -= 1
        return bytes(size) if self.left >= 0 else b""


def test_standard_input_is_stored_in_pieces_and_deleted(spool):
    content = write_video(spool.parent / "a.mp4", numbered_frames(20)).read_bytes()
    with local_file("-", io.BytesIO(content)) as path:
        assert path.startswith(str(spool)) and numbers(probe(path), [0.05, 1.95]) == [0, 19]
    stdin = Endless(5)
    with local_file("-", stdin) as path:
        assert os.path.getsize(path) == 5 * CHUNK_BYTES and set(stdin.asked) == {CHUNK_BYTES}
    for error in (RuntimeError, KeyboardInterrupt, OSError):  # errors that the caller raises
        with pytest.raises(error), local_file("-", io.BytesIO(b"x")):
            raise error


class Terminal(io.BytesIO):
    def isatty(self):
        return True


CLOSED = io.BytesIO(b"x")
CLOSED.close()
UNREADABLE = {
    "full disk": (Endless(5, OSError(28, "No space left on device")), VideoError, "No space left", "TMPDIR"),
    "Ctrl-C": (Endless(5, KeyboardInterrupt()), KeyboardInterrupt, None, ""),
    "empty": (io.BytesIO(b""), VideoError, "standard input is empty", ""),
    "terminal": (Terminal(), UsageError, "terminal", "pipe"),
    "closed": (CLOSED, VideoError, "closed", ""),
    "none": (None, VideoError, "closed", ""),  # the value of `sys.stdin` if the shell closed it with `<&-`
}


@pytest.mark.parametrize(("stdin", "error", "says", "hint"), UNREADABLE.values(), ids=UNREADABLE)
def test_standard_input_that_cannot_be_read(stdin, error, says, hint, spool, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(error, match=says) as caught, local_file("-", stdin):
        pass
    assert error is KeyboardInterrupt or (caught.value.hint and hint in caught.value.hint)


def test_no_place_for_temporary_files_is_an_error(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(VideoError, match="cannot store standard input"), local_file("-", io.BytesIO(b"x")):
        pass


def piped(stdin, source):
    program = (
        "from evoprune.video.frames import local_file, probe\n"
        f"with local_file({source!r}) as path: print(probe(path).frames_total)"
    )
    return subprocess.run([sys.executable, "-c", program], stdin=stdin, capture_output=True, text=True, timeout=60)


@pytest.mark.few(1)
@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="no such names here")
@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_names_of_what_is_open_here(name, spool):
    with open(write_video(spool.parent / "open.mp4", numbered_frames(20)), "rb") as file:
        assert piped(file, name).stdout == "20\n"
    for device, source, says in (
        (os.devnull, name, "/dev/null is not a regular file"),
        (os.devnull, "-", "standard input is empty"),
        ("/dev/zero", "-", "standard input is a device"),
    ):
        with open(device, "rb") as stdin:
            assert re.search(f"VideoError: {says}", piped(stdin, source).stderr)
    with os.popen("true") as pipe, pytest.raises(VideoError, match=r"fd/\d+ is not a regular file") as caught:
        local_file(f"/dev/fd/{pipe.fileno()}").__enter__()
    assert caught.value.hint.startswith("- reads a video from standard input")
