"""Any failure of the worker process becomes an error about the video, and no process or memory is left behind."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evoprune.errors import OutOfMemory, UsageError, VideoError
from evoprune.video import cut_clip, read_audio
from evoprune.video.frames import probe, read_chunks, scan
from evoprune.video.sandbox import channel, isolation
from tests.video.files import number_of, numbered_frames, numbers, pixels, write_video
from tests.video.unruly import PROGRAM

pytestmark = pytest.mark.skipif(not isolation.POSSIBLE, reason="needs Linux")

ROOT = Path(__file__).parents[2]
TIMES = [0.05 + 0.1 * i for i in range(20)]
SMALL = 4 * 64 * 48 * 3  # size of four frames in bytes


@pytest.fixture(scope="module")
def good(folder):
    return write_video(folder / "good.mp4", numbered_frames(20))


@pytest.fixture
def started(monkeypatch):
    """A list of the process IDs of the unruly workers that have been started."""
    ids, start = [], isolation.WorkerProcess.__init__

    def noting(self):
        start(self)
        ids.append(self.pid)

    isolation.end_all()
    monkeypatch.setattr(isolation.WorkerProcess, "__init__", noting)
    monkeypatch.setattr(isolation, "PROGRAM", PROGRAM)
    yield ids
    isolation.end_all()
    assert not any(map(lives, ids))


@pytest.fixture
def named(good, tmp_path):
    """A function that copies a good video to a file with the given name. The name tells the unruly worker what to do."""

    def call(name):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(good.read_bytes())
        return path

    return call


def lives(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, seconds=5.0):
    end = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not lives(pid)


def test_frames_are_counted_while_they_are_read(named, good, started):
    """Progress is reported about once a second, but more often in this test. It is reported even while an array is being filled."""
    seen, info = [], probe(named("later_slow"))
    frames = sum(len(chunk.pixels) for chunk in read_chunks(info, TIMES, chunk_bytes=SMALL, on_frames=seen.append))
    assert frames == 20 and seen == sorted(seen) and seen.count(8) > 10 and max(seen) <= 20
    seen.clear()
    assert scan(good, on_frames=seen.append).frames == 20 and seen == sorted(seen) and max(seen, default=0) <= 20


@pytest.mark.few(4)
@pytest.mark.parametrize("how", ["read_chunks", "scan"])
@pytest.mark.parametrize(
    "problem",
    [
        isolation.Crash("a video of the callback"), TimeoutError(), OSError(5, "lost"), ValueError(), EOFError(), RecursionError(),
        MemoryError(), isolation.Stopped(), KeyError("a"), KeyboardInterrupt(),
    ],
    ids=lambda problem: type(problem).__name__,
)  # fmt: skip
def test_what_a_callback_raises_is_the_callers_own(problem, how, named, good, started):
    """It is never mistaken for an error of the process, so nothing is read again, and the process is killed."""
    calls = []

    def told(frames):
        calls.append(frames)
        raise problem

    info = probe(named("later_slow"))
    isolation.end_all()  # a new process reports for the first time at once
    started.clear()
    with pytest.raises(type(problem)) as caught:
        scan(good, on_frames=told) if how == "scan" else list(read_chunks(info, TIMES, on_frames=told))
    assert caught.value is problem and len(calls) == 1
    assert len(started) == 1 and gone(started[0])
    assert numbers(probe(good), TIMES) == list(range(20))


@pytest.mark.parametrize("stopped", [True, False])
def test_what_reads_is_stopped_from_another_thread(stopped, named, good, started):
    """Reading stops immediately, whatever the process is doing. It is not retried, and no other reading can start in the scope."""
    info, scope, problems, waits = probe(named("later_hang")), isolation.Scope(), [], threading.Event()

    def read():
        scope.enter()
        for again in (False, True):
            try:
                for _ in read_chunks(info, TIMES, chunk_bytes=SMALL):
                    waits.set()
            except isolation.Stopped as problem:
                problems.append((again, problem))

    thread = threading.Thread(target=copy_context().run, args=(read,))
    thread.start()
    assert waits.wait(20)
    time.sleep(0.2)
    if stopped:  # simulates a process that is blocked by disk I/O
        os.kill(started[0], signal.SIGSTOP)
    begun = time.monotonic()
    scope.stop()
    thread.join(20)
    assert time.monotonic() - begun < 5 and [again for again, _ in problems] == [False, True]
    assert gone(started[0]) and len(started) <= 2  # the second process was idle
    assert numbers(probe(good), TIMES) == list(range(20))


CRASHES = {
    "crash": "Segmentation fault", "abort": "Aborted", "killed": "Killed", "exit": "exit code 7",
    "nonsense": "its answer is invalid",
}  # fmt: skip


@pytest.mark.few(2)
@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_is_an_error_about_the_video(name, named, good, started):
    path = named(name)
    with pytest.raises(VideoError) as caught:
        probe(path)
    assert (caught.value.exit_code, caught.value.stage, bool(caught.value.hint)) == (3, "read", True)
    assert str(path) in caught.value.message and CRASHES[name] in caught.value.message
    assert len(started) == 2 and all(map(gone, started))
    assert probe(good).frames_total == 20


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["crash", "nonsense"])
def test_a_crash_while_frames_are_read(name, named, good, started):
    info = probe(named(f"later_{name}"))
    chunks = read_chunks(info, TIMES, chunk_bytes=SMALL)
    got = []
    with pytest.raises(VideoError, match=CRASHES[name]):
        for chunk in chunks:
            got += [number_of(rgb) for rgb in chunk.pixels]
    # Two arrays were read. The second process read them again and crashed, too.
    assert got == list(range(8)) and len(started) == 2
    assert numbers(probe(good), TIMES) == list(range(20))


def test_a_process_that_an_earlier_video_has_spoilt_is_replaced(named, started):
    info = probe(named("once_crash"))
    assert info.frames_total == 20 and len(started) == 2
    os.rmdir(info.path + ".done")
    assert numbers(info, TIMES, chunk_bytes=SMALL) == list(range(20)) and len(started) == 3


READING = {
    "once_crash": probe,
    "first_once_crash": lambda path: list(read_chunks(probe(path), TIMES)),
    "sound_once_crash": lambda path: list(read_audio(probe(path), 0.0, 1.0)),
    "clip_once_crash": lambda path: cut_clip(probe(path), 0.0, 1.0, f"{path}.clips"),
}


@pytest.mark.parametrize("name", READING)
def test_a_retry_starts_a_new_process(name, tmp_path, good, started):
    """Processes that are idle have read other videos, so they may have been spoilt, too."""
    path = write_video(tmp_path / f"{name}.mp4", numbered_frames(20), audio_s=2.0)
    with isolation.borrow("a") as first, isolation.borrow("b") as second:
        first.finish()
        second.finish()
    assert READING[name](str(path)) and len(started) == 3
    assert probe(good).frames_total == 20 and sum(map(lives, started)) == 2


def test_limits_on_idle_processes_that_overlap(good, started):
    """Each limit ends with its own block, whatever the order. Processes that are too many then end at once."""

    def idle_after(count):
        chunks = [read_chunks(probe(good), TIMES, chunk_bytes=SMALL) for _ in range(count)]
        for each in chunks:
            next(each)
        for each in chunks:
            list(each)
        return sum(map(lives, started))

    first, second = isolation.keep_idle(2), isolation.keep_idle(3)
    with first:
        second.__enter__()
        assert idle_after(5) == 5
    assert sum(map(lives, started)) == 3
    second.__exit__(None, None, None)
    assert sum(map(lives, started)) == isolation.MAX_IDLE == idle_after(3)


@pytest.mark.parametrize("for_memory", [False, True])
def test_those_that_died_while_idle_are_replaced(good, started, monkeypatch, for_memory):
    with isolation.borrow("a") as first, isolation.borrow("b") as second:
        first.finish()
        second.finish()
    for pid in started:
        os.kill(pid, signal.SIGKILL)
    assert all(map(gone, started)) and len(started) == 2
    if for_memory:  # simulates the system's counter of out-of-memory kills
        monkeypatch.setattr("evoprune.backend.limits.Host.oom_kills", lambda _: 1e9)
    assert probe(good).frames_total == 20 and len(started) == 3


@pytest.mark.few(1)
@pytest.mark.parametrize("when", ["", "later_"])
def test_silence_is_an_error(when, named, good, started, monkeypatch):
    """The workers are started under the usual limit, because that may take longer than the short ones."""
    usual, path = isolation.SILENCE_S, named(f"{when}hang")
    probe(good)
    monkeypatch.setattr(isolation, "SILENCE_S", 0.6)
    begin = time.monotonic()
    with pytest.raises(VideoError, match="is stuck") as caught:
        numbers(probe(path), TIMES, chunk_bytes=SMALL)
    assert str(path) in caught.value.message and time.monotonic() - begin < 24  # well before the usual 25 s
    assert len(started) == 1 and gone(started[0])
    if not when:
        monkeypatch.setattr(isolation, "SILENCE_S", usual)
        probe(good)
        monkeypatch.setattr(isolation, "SILENCE_S", 2.5)
        # This takes three seconds, but the worker reports that it is alive.
        assert probe(named("slow")).frames_total == 20


def test_memory_is_limited(named, good, started):
    with pytest.raises(VideoError, match=r"takes more than 1\.0 GiB") as caught:
        probe(named("memory"))
    assert caught.value.exit_code == 3
    assert probe(good).frames_total == 20 and len(started) == 3


SECRETS = {
    "EVOPRUNE_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS", "GITHUB_TOKEN", "DATABASE_URL", "PGPASSWORD", "http_proxy", "HTTPS_PROXY", "ALL_PROXY",
    "PIP_INDEX_URL", "SSH_AUTH_SOCK", "UNKNOWN",
}  # fmt: skip


def test_a_process_has_no_secrets(good, started, monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, "http://user:very-secret@host:1")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("LC_TIME", "C")
    for use in (probe, scan, lambda path: numbers(probe(path), TIMES), lambda path: (isolation.warm_up(), probe(path))):
        isolation.end_all()
        use(good)
        content = Path(f"/proc/{started[-1]}/environ").read_bytes()
        assert lives(started[-1]) and b"secret" not in content and b"TZ=UTC" in content and b"LC_TIME=C" in content
    assert len(started) == 4


def test_nothing_is_written_and_a_bug_comes_with_its_traceback(named, good, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named("write")
    with pytest.raises(RuntimeError, match="File too large"):
        probe("write.mp4")
    assert (tmp_path / "written").stat().st_size == 0
    with pytest.raises(RuntimeError, match="ZeroDivisionError: 1/0") as caught:
        probe(named("bug"))
    assert "tests/video/unruly.py" in caught.value.__notes__[0]
    assert probe(good).frames_total == 20 and len(started) == 1


def test_neither_side_has_what_it_does_not_need(named, started):
    with pytest.raises(VideoError) as caught:
        probe(named("modules"))
    there = caught.value.message.split()
    assert "av" in there and not {"torch", "transformers", "decord", "subprocess", "site"} & set(there)
    program = "import sys; from evoprune.video.frames import probe\nassert not {'numpy', 'av'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_a_process_that_cannot_start(named, started, monkeypatch):
    monkeypatch.setattr(isolation, "PROGRAM", "{paths}; import nonexistent{socket}")
    with pytest.raises(VideoError, match="exit code 1") as caught:
        probe(named("fine"))
    assert "No module named 'nonexistent" in caught.value.__notes__[-1]
    monkeypatch.setattr(sys, "executable", "/bin/true")  # not Python, as in a program that embeds Python
    with pytest.raises(VideoError, match="exit code 0") as caught:
        probe(named("fine"))
    assert caught.value.hint.endswith("; or sys.executable, /bin/true, is not Python")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(UsageError, match="cannot start the process that reads videos: No such file") as caught:
        probe(named("fine"))
    assert caught.value.hint == "sys.executable is /nonexistent/python; set it to a Python that can be run"


CANNOT = {
    errno.ENOMEM: (OutOfMemory, "close other programs"),
    errno.EMFILE: (UsageError, "close files that this program has open, or raise their limit: ulimit -n"),
    errno.ENFILE: (UsageError, "close other programs: this system has too many open files"),
    errno.EAGAIN: (UsageError, "end other processes of this user, or raise their limit: ulimit -u"),
}


@pytest.mark.parametrize("number", CANNOT)
def test_what_the_system_refuses(named, good, started, monkeypatch, number):
    """The system refuses to start a process or to provide memory for frames."""

    def refuses(*_, **__):
        raise OSError(number, os.strerror(number))

    video, (kind, hint) = probe(good), CANNOT[number]
    monkeypatch.setattr(os, "memfd_create", refuses)
    with pytest.raises(
        MemoryError if number in (errno.ENOMEM, errno.EAGAIN) else UsageError, match=os.strerror(number)
    ):
        list(read_chunks(video, TIMES))
    isolation.end_all()
    monkeypatch.setattr(subprocess, "Popen", refuses)
    with pytest.raises(kind, match=f"cannot start the process that reads videos: {os.strerror(number)}") as caught:
        probe(named("fine"))
    assert (type(caught.value), caught.value.hint, caught.value.stage) == (kind, hint, "read")


def test_one_process_serves_one_video_after_the_other(good, started):
    """A process can be started before the first video, and it keeps running after the thread that started it has ended."""
    for _ in range(2):
        thread = threading.Thread(target=isolation.warm_up)
        thread.start()
        thread.join()
        time.sleep(0.1)
        assert numbers(probe(good), TIMES, chunk_bytes=SMALL) == list(range(20))
    assert len(started) == 1


def test_threads(good, started):
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda _: numbers(probe(good), TIMES, chunk_bytes=SMALL), range(8)))
    assert got == [list(range(20))] * 8 and sum(map(lives, started)) <= isolation.MAX_IDLE


def test_who_stops_early_leaves_nothing_behind(named, started):
    info = probe(named("later_hang"))
    chunks = read_chunks(info, TIMES, chunk_bytes=SMALL)
    next(chunks)
    next(chunks)  # the worker hangs in the third array
    chunks.close()
    assert gone(started[0])


@pytest.fixture
def pieces(monkeypatch):
    """A list to which the `FrameMemory` of each video is appended."""
    made, start = [], channel.FrameMemory.__init__
    monkeypatch.setattr(channel.FrameMemory, "__init__", lambda self, size: start(self, size) or made.append(self))
    return made


def test_memory_is_used_again_once_nobody_holds_what_is_in_it(good, started, pieces):
    found = []
    for chunk in read_chunks(probe(good), TIMES, chunk_bytes=SMALL // 2):
        found += map(number_of, chunk.pixels)
    assert found == list(range(20))
    (of_video,) = pieces
    assert len(of_video._pieces) <= 3  # the array that the caller has, the one before it, and the one being filled


VIEWS = (
    lambda frames: frames,
    lambda frames: frames[1:, ::2],
    lambda frames: frames.reshape(-1),
    lambda frames: torch.from_numpy(frames)[:1],
)


@pytest.mark.few(1)
@pytest.mark.parametrize("hold", VIEWS)
def test_what_somebody_holds_is_not_written_over(good, started, pieces, hold):
    """Memory is not reused while a view or a torch tensor refers to it. It stays writable after the worker process has exited."""
    info = probe(good)
    kept = [hold(chunk.pixels) for chunk in read_chunks(info, TIMES, chunk_bytes=SMALL // 2)]
    isolation.end_all()
    whole = pixels(list(read_chunks(info, TIMES)))
    for first, held in zip(range(0, 20, 2), kept, strict=True):
        assert np.array_equal(held, hold(whole[first : first + 2]))
        held[:1] = 0
    assert whole.all() and len(pieces[0]._pieces) == channel.PIECES


@pytest.mark.full
def test_what_a_copy_of_this_process_holds_is_not_written_over(good, started):
    """After a fork, both processes share the memory, but each process knows only its own references to it."""
    children = []
    for chunk in read_chunks(probe(good), TIMES, chunk_bytes=SMALL // 2):
        before, (reads, writes) = chunk.pixels.tobytes(), os.pipe()
        child = os.fork()
        if not child:
            os.close(writes)
            os.read(reads, 1)  # waits until everything has been read
            os._exit(chunk.pixels.tobytes() != before)
        os.close(reads)
        children.append((child, writes))
    for _, writes in children:  # each of them was inherited by the children that were forked later
        os.close(writes)
    for child, _ in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    child = os.fork()  # the child starts its own worker process
    if not child:
        os._exit(numbers(probe(good), TIMES) != list(range(20)) or len(started) != 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert numbers(probe(good), TIMES) == list(range(20)) and len(started) == 1


def test_memory_for_frames_cannot_be_taken_away(good, started, tmp_path):
    """The worker cannot shrink the memory, which would crash this process. It also does not keep any of it after reading."""
    shared, descriptor = channel.shared_memory(100)
    with pytest.raises(OSError):
        os.ftruncate(descriptor, 10)
    os.close(descriptor)
    assert shared[99] == 0
    list(read_chunks(probe(good), TIMES, chunk_bytes=SMALL))
    with pytest.raises(VideoError):  # reading ends with an error
        list(read_chunks(replace(probe(good), path=str(tmp_path / "gone.mp4")), TIMES, chunk_bytes=SMALL))
    (pid,) = started
    assert "evoprune-frames" not in Path(f"/proc/{pid}/maps").read_text()


PARENT = """
import sys
from evoprune.video.sandbox import isolation
from evoprune.video.frames import probe
from tests.video.unruly import PROGRAM
isolation.PROGRAM = PROGRAM
probe(sys.argv[1])
print(isolation._idle[0].pid, flush=True)
sys.argv[:2] = ["evoprune", "ask"]
from evoprune_cli.main import run
run()
"""


def shielded():
    """Make this process handle Ctrl-C, but ignore and block SIGIO, which its child processes inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])


@pytest.mark.full
@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
def test_it_ends_with_the_process_that_started_it(how, code, named, good):
    words = [str(good), str(named("hang")), "What happens?"]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"stdin": subprocess.DEVNULL}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", PARENT, *words]
    with subprocess.Popen(program, cwd=ROOT, env=environment, preexec_fn=shielded, **pipes) as parent:
        pid = int(parent.stdout.readline())
        while not os.path.exists(words[1] + ".begun"):
            time.sleep(0.05)
        assert lives(pid)  # the process hangs while it holds the GIL
        parent.send_signal(how)
        assert parent.wait(60) == code
        assert b"Traceback" not in parent.stderr.read()
    assert gone(pid)


def test_requests_and_answers_that_are_too_long_are_errors(good, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr(channel, "LARGEST", 1000)
        with pytest.raises(VideoError, match="a message of") as caught:
            probe("x" * 2000)
        assert caught.value.hint
    isolation.end_all()
    limit = "from evoprune.video.sandbox import channel; channel.LARGEST = 350; main("
    monkeypatch.setattr(isolation, "PROGRAM", isolation.PROGRAM.replace("main(", limit))
    with pytest.raises(VideoError, match="a message of") as caught:
        probe(good)
    assert caught.value.hint
    isolation.end_all()
