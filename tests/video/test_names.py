"""What stands where a path may stand: odd names, links, devices, pipes, playlists, and standard input."""

import io
import os
import socket
import subprocess
import sys
import tempfile
import threading

import pytest

from evoprune.errors import UsageError, VideoError
from evoprune.video.frames import CHUNK_BYTES, local_file, probe, read_frames, scan
from tests.decoders import DECODERS, EVERY
from tests.video.files import numbered_frame, numbered_frames, numbers, write_image, write_video

NAMES = [
    "two words .mp4", 'it\'s "so".mp4', "new\nline.mp4", "Überraschung 视频 🎬.mp4", "$HOME `ls`;.mp4",
    "-", "-i.mp4", "--help", "100%.mp4", "f%d.mp4", "f%03d.png", "*?[a]{b}.mp4", "back\\slash.mp4", "12:30:00.mp4", "file:a.mp4",
    "concat:a.mp4|b.mp4", "pipe:1", "pipe:", "http:/a.mp4", "http:a.mp4", "subfile,,start,0,end,9,,:a.mp4",
    "data:video;base64,AAAA", "crypto:a", "a.m3u8", "a.ffconcat", "a.sdp",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.few(6)
@pytest.mark.parametrize("decoder", EVERY)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
def test_a_name_is_nothing_but_a_name(name, decoder, here):
    video = write_video(here / "plain.mp4", numbered_frames(9)[3:6])
    write_video(here / "f1.mp4", numbered_frames(2))  # what a pattern would find
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    video.rename(here / name)
    for path in (name, str(here / name)):
        info = probe(path)
        assert info.path == path
        assert numbers(info, [0.05, 0.25], decoder=decoder) == [3, 5]


@pytest.mark.skipif(os.name == "nt", reason="Windows names are text")
def test_a_name_that_is_no_text(here):
    video = write_video(here / "plain.mp4", numbered_frames(3))
    name = os.fsdecode(b"\xff\xfe.mp4")
    try:
        video.rename(here / name)
    except OSError:
        pytest.skip("this file system wants text")
    info = probe(name)
    for decoder in DECODERS:
        assert numbers(info, [0.25], decoder=decoder) == [2]


@pytest.mark.parametrize(
    "name", ["https://example.org/a.mp4", "rtsp://a/b", "file:///a.mp4", "pipe:1", "http:/a.mp4", "concat:a|b"]
)
def test_what_is_not_there_is_not_fetched(name, here):
    with pytest.raises(VideoError, match="URL" if "://" in name else "no such file"):
        probe(name)


@pytest.fixture
def server():
    """The port of a server, and a list of who called."""
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


LEADS_NOWHERE = [
    "loop.mp4", "loop2.mp4", "dangling.mp4", "in/itself", "a.mp4/b.mp4", "x" * 300, "a/../../nowhere.mp4", "loop.mp4/a",
]  # fmt: skip


@pytest.mark.parametrize("name", LEADS_NOWHERE)
@pytest.mark.skipif(os.name == "nt", reason="links are for Unix")
def test_paths_that_lead_nowhere(name, here):
    write_video(here / "a.mp4", numbered_frames(3))
    (here / "loop.mp4").symlink_to("loop2.mp4")
    (here / "loop2.mp4").symlink_to("loop.mp4")
    (here / "dangling.mp4").symlink_to("missing.mp4")
    (here / "in").mkdir()
    (here / "in" / "itself").symlink_to("itself")
    for use in (probe, scan):
        with pytest.raises(VideoError) as caught:
            use(name)
        assert name[:90] in caught.value.message and caught.value.exit_code == 3 and caught.value.hint


@pytest.mark.skipif(os.name == "nt", reason="links are for Unix")
def test_links_are_followed(here):
    video = write_video(here / "a.mp4", numbered_frames(3))
    (here / "link.mp4").symlink_to(video)
    (here / "folder").symlink_to(here)
    assert numbers(probe("link.mp4"), [0.25]) == numbers(probe("folder/folder/link.mp4"), [0.25]) == [2]
    assert probe("link.mp4").path == "link.mp4"


DEVICES = ["/dev/zero", "/dev/null", "/dev/full", "/dev/random", "/dev/tty", "/proc/self/mem", "/proc/kmsg", "/sys"]


@pytest.mark.parametrize("path", [path for path in DEVICES if os.path.exists(path)])
def test_devices_are_no_videos(path):
    with pytest.raises(VideoError) as caught:
        probe(path)
    assert path in caught.value.message and caught.value.hint


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_and_sockets_are_not_waited_for(here):
    os.mkfifo("pipe.mp4")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.mp4")
        for name in ("pipe.mp4", "socket.mp4"):
            with pytest.raises(VideoError, match="not a regular file"):
                probe(name)
    images = here / "images"
    images.mkdir()
    os.mkfifo(images / "1.png")
    (images / "2.png").symlink_to("/dev/zero")
    (images / "3.png").symlink_to("3.png")
    with pytest.raises(VideoError, match="no images"):
        probe("images")
    (images / "5.png").symlink_to("4.png")
    write_image(images / "4.png", numbered_frame(44))
    assert numbers(probe("images"), [0.0, 0.5]) == [44, 44] and probe("images").frames_total == 2


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(here):
    write_video(here / "a.mp4", numbered_frames(3)).chmod(0)
    closed = here / "closed"
    closed.mkdir()
    write_video(closed / "a.mp4", numbered_frames(3))
    closed.chmod(0)
    for name in ("a.mp4", "closed/a.mp4", "closed"):
        with pytest.raises(VideoError, match="Permission denied"):
            probe(name)
    closed.chmod(0o700)


def test_a_hole_of_a_terabyte(here):
    """A file of zeros that takes no room, as a video and as an image of a folder."""
    images = here / "images"
    images.mkdir()
    for path in (here / "hole.mp4", images / "hole.png"):
        path.touch()
        os.truncate(path, 2**40)
    for name in ("hole.mp4", "images"):
        with pytest.raises(VideoError) as caught:
            probe(name)
        assert name in caught.value.message


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
    port, calls = server
    write_video(here / "secret.ts", numbered_frames(3))
    path = here / f"list.{kind if ending == 'own' else ending}"
    path.write_text(PLAYLISTS[kind].format(target=target.format(here=here, port=port), port=port))
    for use in (probe, scan):
        with pytest.raises(VideoError) as caught:
            use(path)
        assert (caught.value.exit_code, bool(caught.value.hint)) == (3, True)
    assert not calls


def test_a_video_replaced_by_a_playlist_is_not_followed(here):
    path = write_video(here / "a.mp4", numbered_frames(3))
    info = probe(path)
    write_video(here / "secret.ts", numbered_frames(3), options={"bf": "0"})
    path.write_text(PLAYLISTS["m3u8"].format(target="secret.ts"))
    for decoder in DECODERS:
        with pytest.raises(VideoError):
            list(read_frames(info, [0.0], decoder=decoder))


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps such folders")
def test_a_working_folder_that_is_gone(tmp_path, monkeypatch):
    video = write_video(tmp_path / "a.mp4", numbered_frames(3))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert numbers(probe(video), [0.25]) == [2]
    with pytest.raises(VideoError, match=r"a\.mp4"):
        probe("a.mp4")


@pytest.fixture
def spool(tmp_path, monkeypatch):
    """The folder for temporary files."""
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("source", ["video.mp4", "./-", "--", "", "http://x", "folder/"])
def test_paths_pass_unchanged_and_nothing_is_read(source, spool):
    with local_file(source, stdin=None) as path:
        assert path == source
        assert not list(spool.iterdir())


def test_standard_input_is_spooled_and_deleted(spool):
    content = write_video(spool.parent / "a.mp4", numbered_frames(20)).read_bytes()
    with local_file("-", io.BytesIO(content)) as path:
        assert path.startswith(str(spool))
        info = probe(path)
        assert numbers(info, [0.05, 1.95]) == [0, 19]
    assert not list(spool.iterdir())


class Endless(io.RawIOBase):
    """Megabytes of zeros, and how much was asked for at a time."""

    def __init__(self, chunks):
        self.left, self.asked = chunks, []

    def read(self, size=-1):
        self.asked.append(size)
        self.left -= 1
        return bytes(size) if self.left >= 0 else b""


def test_spooling_takes_one_chunk_at_a_time(spool):
    stdin = Endless(5)
    with local_file("-", stdin) as path:
        assert os.path.getsize(path) == 5 * CHUNK_BYTES
    assert set(stdin.asked) == {CHUNK_BYTES}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_nothing_stays_behind_after_an_error_of_the_caller(error, spool):
    with pytest.raises(error), local_file("-", io.BytesIO(b"x")):
        raise error
    assert not list(spool.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_stays_behind_after_an_error_while_reading(error, spool):
    class Failing(Endless):
        def read(self, size=-1):
            if len(self.asked) == 2:
                raise error
            return super().read(size)

    with pytest.raises((VideoError, KeyboardInterrupt)) as caught, local_file("-", Failing(5)):
        pass
    if isinstance(error, OSError):
        assert "No space left" in caught.value.message and "TMPDIR" in caught.value.hint
    assert not list(spool.iterdir())


def test_no_place_for_temporary_files_is_an_error(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(VideoError, match="cannot store standard input"), local_file("-", io.BytesIO(b"x")):
        pass


def test_empty_input_is_an_error(spool):
    with pytest.raises(VideoError, match="standard input is empty") as caught, local_file("-", io.BytesIO(b"")):
        pass
    assert caught.value.hint
    assert not list(spool.iterdir())


def test_a_terminal_is_no_video():
    class Terminal(io.BytesIO):
        def isatty(self):
            return True

    with pytest.raises(UsageError, match="terminal") as caught, local_file("-", Terminal()):
        pass
    assert "pipe" in caught.value.hint


def test_closed_input_is_an_error(monkeypatch):
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(VideoError, match="closed"), local_file("-", closed):
        pass
    monkeypatch.setattr(sys, "stdin", None)  # what Python makes of `<&-`
    with pytest.raises(VideoError, match="closed"), local_file("-"):
        pass


def piped(stdin, source, text="print(probe(path).frames_total)"):
    program = (
        "import sys\n"
        "from evoprune.video.frames import local_file\n"
        "from evoprune.video.frames import probe\n"
        f"with local_file({source!r}) as path: {text}"
    )
    return subprocess.run([sys.executable, "-c", program], stdin=stdin, capture_output=True, text=True, timeout=60)


@pytest.mark.few(1)
@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="no such names here")
@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_names_of_what_is_open_here(name, spool):
    video = write_video(spool.parent / "open.mp4", numbered_frames(20))
    with open(video, "rb") as file:
        assert piped(file, name).stdout == "20\n"
    done = piped(subprocess.DEVNULL, name)
    assert "VideoError: /dev/null is not a regular file" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device here")
def test_a_pipe_is_no_file():
    with os.popen("true") as pipe, pytest.raises(VideoError, match=r"fd/\d+ is not a regular file") as caught:
        local_file(f"/dev/fd/{pipe.fileno()}").__enter__()
    assert caught.value.hint.startswith("- reads a video from standard input")


def test_a_device_is_no_video(spool):
    with open("/dev/zero", "rb") as endless:
        assert "VideoError: standard input is a device" in piped(endless, "-").stderr
    with open(os.devnull, "rb") as nothing:
        assert "VideoError: standard input is empty" in piped(nothing, "-").stderr
