"""Reading ahead stops immediately, even while a worker process is busy, but work that others need continues."""

import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from evoprune.session import upcoming
from evoprune.session.ahead import ReadAhead
from evoprune.session.encoding import open_inputs
from evoprune.session.loading.description import describe
from evoprune.session.options import ModelOptions
from evoprune.session.upcoming import in_flight
from evoprune.video import SamplingOptions
from evoprune.video.sandbox import isolation
from evoprune.video_qa import VideoQA
from tests.threads import LONGEST_S, check_ended
from tests.video.unruly import PROGRAM

GOOD, SAMPLING = "samples/three.mp4", SamplingOptions(frames=4)
PATIENCE_S = 4 * LONGEST_S  # for threads that cannot be stopped, and for workers that are silent
HANGS = ["hang", "first_hang"]  # during probing; while reading the first frames

pytestmark = pytest.mark.skipif(not isolation.POSSIBLE, reason="videos are read in the process itself")


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    isolation.end_all()
    monkeypatch.setattr(isolation, "PROGRAM", PROGRAM)
    monkeypatch.setattr(isolation, "SILENCE_S", PATIENCE_S)
    for module in ("ahead", "reading"):
        monkeypatch.setattr(f"evoprune.session.{module}.PATIENCE_S", PATIENCE_S)
    before = set(threading.enumerate())
    yield
    isolation.end_all()
    check_ended(before)


@pytest.fixture
def named(tmp_path):
    """Return a function that copies a valid video to a file with the given name."""

    def call(name):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(Path(GOOD).read_bytes())
        return str(path)

    return call


@pytest.fixture
def qa(saved):
    return VideoQA.load(str(saved), budget=0.5)


def begun(path):
    """Wait until the worker hangs and its consumer is waiting for it."""
    until = time.monotonic() + 60
    while not Path(path.replace("first_", "") + ".begun").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.2)


@contextmanager
def at_once():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < LONGEST_S


def opener(qa):
    return lambda path: open_inputs(qa.session, [path], SAMPLING)


def test_patches_that_others_need_are_read_on(qa, named, monkeypatch):
    """They are read to the end even if the first consumer is stopped."""
    monkeypatch.setattr(upcoming, "readers", lambda loaded: 2)
    path, waits = named("first_hang"), []
    with ExitStack() as stack:
        ahead = stack.enter_context(closing(in_flight([path, path], opener(qa), qa.loaded)))
        first, second = (next(ahead)[1] for _ in range(2))
        begun(path)
        (entry,) = qa.loaded.patches._entries.values()
        kept = entry.read()
        with at_once():
            first.close()
            ahead.close()
        assert entry.users and not kept.has_ended

        def wait():
            with suppress(isolation.Stopped):
                waits.extend(kept.chunks())

        waiting = threading.Thread(target=wait)
        waiting.start()
        with at_once():
            second.close()
            waiting.join()
        assert kept.has_ended and not qa.loaded.patches._entries and not waits


@pytest.mark.few(3)
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", HANGS)
def test_inputs_that_are_read_ahead(qa, named, monkeypatch, name, count, keeps):
    monkeypatch.setattr(upcoming, "readers", lambda loaded: count)
    qa.loaded.patches.limit_bytes *= keeps
    path = named(name)
    ahead = in_flight([GOOD, path, GOOD], opener(qa), qa.loaded)
    _, inputs = next(ahead)
    with closing(inputs):
        inputs.encode()
    begun(path)
    with at_once():
        ahead.close()


@pytest.mark.few(2)
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("name", HANGS)
def test_inputs_that_are_read_before_the_model_is_there(qa, saved, named, name, wanted):
    """If `wanted` is True, a session is waiting for the input in a thread that is stopped."""
    path = named(name)
    scope = isolation.Scope()

    def encodes():
        scope.enter()
        with suppress(isolation.Stopped), closing(open_inputs(qa.session, [path], SAMPLING, ahead=ahead)) as opened:
            opened.encode()

    with ReadAhead(describe(ModelOptions(str(saved))), [([path], SAMPLING)]) as ahead:
        begun(path)
        if wanted:
            encoding = threading.Thread(target=encodes)
            encoding.start()
            time.sleep(0.3)
            with at_once():
                scope.stop()
                encoding.join()
        with at_once():
            ahead.close()
