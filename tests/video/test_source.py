import io
import os
import subprocess
import sys
import tempfile

import pytest

from evoprune.errors import UsageError, VideoError
from evoprune.video.frames import CHUNK_BYTES, local_file, probe
from tests.video.files import numbered_frames, numbers, write_video


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


def test_the_standard_input_of_a_process(spool):
    video = write_video(spool.parent / "piped.mp4", numbered_frames(20))
    program = (
        "from evoprune.video.frames import local_file\n"
        "from evoprune.video.frames import probe\n"
        "with local_file('-') as path: print(probe(path).frames_total)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(video.read_bytes())
    assert (out.strip(), process.returncode) == (b"20", 0)


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
