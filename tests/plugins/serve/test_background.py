"""The server in the background, and what is left if a client or a server is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.contract.running import command, masked_record, materials, running
from tests.plugins.serve.serving import COLOUR, REASON, SAMPLES, serving

pytest.importorskip("starlette", reason=REASON)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="Unix sockets")

ASK = ["ask", "samples/square.mp4", COLOUR, "--via", "auto"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return materials(tmp_path_factory.mktemp("background"))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder in which this user's server has its socket."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "evoprune"


def make(place: Path, mode: int = 0o700) -> None:
    """Make the folder, with the socket of a server that was killed."""
    import socket

    place.mkdir(mode=mode)
    place.chmod(mode)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / "serve.sock"))
    (place / "serve.lock").write_text("1 ready")


def refused(folder: Path) -> str:
    """Return the error of a command that must not use the socket."""
    with running(folder):
        code, out, err = command(*ASK)
    assert code == 2 and not out and err.startswith("error: ") and "hint: " in err and err.count("\n") == 2, err
    return err


def test_a_folder_that_others_can_open_is_refused(folder, place):
    make(place, 0o755)
    assert f"other users can open {place}" in refused(folder)


def test_a_folder_of_another_user_is_refused(folder, place, monkeypatch):
    make(place)
    monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    assert f"{place} is not a folder of this user" in refused(folder)


def test_a_link_to_a_folder_is_refused(folder, place):
    make(place.with_name("other"))
    place.symlink_to(place.with_name("other"))
    assert f"{place} is not a folder of this user" in refused(folder)


@pytest.mark.parametrize("name", ["serve.sock", "serve.lock"])
def test_a_file_of_another_kind_is_refused(folder, place, name):
    make(place)
    (place / name).unlink()
    (place / name).symlink_to("elsewhere")
    assert f"{place / name} was not made by a server of this user" in refused(folder)


def test_without_a_server_the_model_is_loaded_here_and_a_dead_socket_is_removed(folder, place):
    with running(folder):
        assert command(*ASK)[:2] == (0, "green\n")
    make(place)
    with running(folder):
        assert command(*ASK)[:2] == (0, "green\n")
    assert not (place / "serve.sock").exists()


def test_a_server_ends_when_it_has_been_idle(qa, tmp_path, slow):
    with serving(qa, tmp_path) as server:
        from tests.plugins.serve.serving import CHAT, body

        replies = []
        asking = threading.Thread(target=lambda: replies.append(server.client.post(CHAT, json=body())))
        asking.start()
        assert slow.begun.wait(60)
        server.process._idle_s = 0.3
        time.sleep(1)
        assert not server.process.should_exit and server.client.get("/health").status_code == 200
        slow.set()
        asking.join()
        assert replies[0].status_code == 200
        wait(lambda: not server.process.started or closed(server.url))


def closed(url: str) -> bool:
    import socket

    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return True
    return False


def wait(true: Callable[[], object], longest_s: float = 30) -> None:
    end = time.monotonic() + longest_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# With real processes.


@pytest.fixture
def home(tmp_path, folder) -> Iterator[dict[str, str]]:
    """The environment of processes whose temporary files and sockets are in a folder of their own."""
    if "serve" not in {entry.name for entry in entry_points(group="evoprune.commands")}:
        pytest.skip("the plug-in is not installed")
    (tmp_path / "tmp").mkdir()
    usual = {name: value for name, value in os.environ.items() if not name.startswith("EVOPRUNE_")}
    environment = usual | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path / "tmp")}
    yield environment | {"XDG_RUNTIME_DIR": str(tmp_path)}
    evoprune(environment | {"XDG_RUNTIME_DIR": str(tmp_path)}, folder, "serve", "--stop")


def started(home: dict[str, str], folder: Path, *words: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "evoprune_cli", *words]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=home, cwd=folder, **pipes)


def evoprune(home: dict[str, str], folder: Path, *words: str) -> tuple[int, str, str]:
    process = started(home, folder, *words)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def server_of(home: dict[str, str]) -> int:
    """Return the process ID of the server in the background."""
    return int((Path(home["XDG_RUNTIME_DIR"]) / "evoprune" / "serve.lock").read_text().split()[0])


def processes(home: dict[str, str]) -> list[str]:
    """Return the command lines of all running processes with this environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"XDG_RUNTIME_DIR={home['XDG_RUNTIME_DIR']}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


@pytest.mark.full
def test_a_loop_over_files_with_and_without_a_server(home, folder):
    clips = [f"clip {number}.mp4" for number in range(10)]
    names = sorted(SAMPLES.glob("*.mp4"))
    for number, clip in enumerate(clips):
        shutil.copy(names[number % len(names)], folder / clip)
    here = [evoprune(home, folder, "ask", clip, COLOUR, "--json") for clip in clips]
    assert evoprune(home, folder, "serve", "--detach", "--allow-dir", str(folder))[0] == 0
    there = [evoprune(home | {"EVOPRUNE_VIA": "auto"}, folder, "ask", clip, COLOUR, "--json") for clip in clips]
    assert evoprune(home, folder, "serve", "--stop")[0] == 0
    for mine, theirs in zip(here, there, strict=True):
        assert theirs[0] == mine[0] == 0 and theirs[2] == mine[2]
        records = [masked_record(json.loads(done[1])) for done in (mine, theirs)]
        for record in records:
            record["time_ms"] = record["rate"] = None
            for each in record["inputs"]:
                each["time_ms"] = None
        assert records[0] == records[1]
    assert not processes(home)


@pytest.mark.full
def test_detach_and_stop(home, folder):
    place = Path(home["XDG_RUNTIME_DIR"]) / "evoprune"
    code, _, err = evoprune(home, folder, "serve", "--detach", "--keep", "1h")
    assert code == 0 and "runs in the background" in err
    assert (place.stat().st_mode & 0o777, (place / "serve.sock").stat().st_mode & 0o777) == (0o700, 0o600)
    code, _, err = evoprune(home, folder, "serve", "--detach")
    assert code == 2 and f"already runs in the background (process {server_of(home)})" in err
    assert evoprune(home, folder, "ask", "samples/square.mp4", COLOUR, "-q", "--via", "auto")[:2] == (0, "green\n")
    assert "/v1/evoprune/ask 200" in (place / "serve.log").read_text()
    code, _, err = evoprune(home, folder, "serve", "--stop")
    assert code == 0 and "the server has ended" in err
    assert [path.name for path in place.iterdir()] == ["serve.log"] and not processes(home)
    assert not [*Path(home["TMPDIR"]).iterdir()]
    code, _, err = evoprune(home, folder, "serve", "--stop")
    assert code == 0 and "no server" in err
    for words in (("-m", "gone/"), ("--keep", "0s"), ("--port", "1"), ("-m", "./gone")):
        code, _, err = evoprune(home, folder, "serve", "--detach", *words)
        assert code in (2, 4) and re.fullmatch(r"(error|hint): .*\n(error|hint): .*\n", err), err
    assert not processes(home)


@pytest.mark.full
def test_it_ends_by_itself(home, folder):
    assert evoprune(home, folder, "serve", "--detach", "--keep", "2s", "--keep", "3")[0] == 0
    wait(lambda: not processes(home), 60)
    place = Path(home["XDG_RUNTIME_DIR"]) / "evoprune"
    assert [path.name for path in place.iterdir()] == ["serve.log"]


@pytest.mark.full
def test_nothing_hangs_or_is_left_if_a_client_or_the_server_is_killed(home, folder):
    place, files = Path(home["XDG_RUNTIME_DIR"]) / "evoprune", Path(home["TMPDIR"])
    words = ["ask", "samples/square.mp4", *(f"-Q{number} {COLOUR}" for number in range(40)), "--via", "auto"]
    for _ in range(10):
        assert evoprune(home, folder, "serve", "--detach")[0] == 0  # removes the files of a server that was killed
        (stored,) = files.iterdir()
        for ending in (signal.SIGKILL, signal.SIGINT):
            client = started(home, folder, *words)
            assert client.stdout.readline()
            client.send_signal(ending)
            client.communicate(timeout=30)
            assert client.returncode == -ending
            wait(lambda stored=stored: left_in(stored) == [".evoprune-lock"])
        client = started(home, folder, *words)
        assert client.stdout.readline()
        os.kill(server_of(home), signal.SIGKILL)
        _, err = client.communicate(timeout=30)
        assert client.returncode == 4 and "error: " in err and "hint: " in err and "Traceback" not in err, err
        wait(lambda: not processes(home))
        # The next command removes the socket, and loads the model itself.
        assert evoprune(home, folder, "ask", "samples/square.mp4", COLOUR, "-q", "--via", "auto")[0] == 0
        assert not (place / "serve.sock").exists()
    assert evoprune(home, folder, "serve", "--detach")[0] == evoprune(home, folder, "serve", "--stop")[0] == 0
    assert not processes(home) and not left_in(files) and left_in(place) == ["serve.log"]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
