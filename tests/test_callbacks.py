"""Callbacks of the caller may raise anything. The caller gets this very exception, after one call, and nothing stays behind."""

import gc
import os
import tempfile
import threading
import weakref
from contextlib import suppress
from itertools import count
from pathlib import Path

import httpx2
import pytest

from evoprune.batch import RowReader, Settings, Span, answers
from evoprune.bench import EvalSettings, Evaluation, VideoQuestions
from evoprune.errors import OutOfMemory, VideoError, callback_errors, memory_guard
from evoprune.report import Report
from evoprune.session import Answer
from evoprune.video import LiveSource, downloaded
from evoprune.video_qa import VideoQA
from tests.threads import check_ended, one_thread  # noqa: F401

CLIPS = ["samples/square.mp4", "samples/three.mp4"]
# Errors that this project's own code handles somewhere between the callback and the caller.
PROBLEMS = [
    ValueError("a"), OSError(28, "no space"), MemoryError(), RuntimeError("out of memory"), TimeoutError(),
    VideoError("another video"), OutOfMemory("other memory", stage="encode"), httpx2.ReadTimeout("another server"),
]  # fmt: skip
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)


@pytest.fixture(scope="module")
def qa():
    return VideoQA.load("demo", device="cpu", budget=0.5)


@pytest.fixture(autouse=True)
def no_file_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not os.listdir(tmp_path)


class Raising:
    """A callback that raises a problem, either in the first call or in the first call with a given first argument."""

    def __init__(self, problem, stage=None):
        self.problem, self.stage, self.calls = problem, stage, 0

    def __call__(self, *given):
        if self.stage is None or self.stage == given[0]:
            self.calls += 1
            raise self.problem


def check_raised(work, callback):
    """Check that `work` raises the callback's own exception, and that no thread is left."""
    threads = set(threading.enumerate())
    with pytest.raises(type(callback.problem)) as caught:
        work()
    assert caught.value is callback.problem and callback.calls == 1
    check_ended(threads)


def test_a_callback_is_passed_through_every_handler():
    """The exception keeps its cause and its context. Exceptions of the block itself are handled as usual."""
    problem, cause, context = MemoryError(), KeyError("cause"), KeyError("context")
    problem.__cause__, problem.__context__ = cause, context
    handled = []

    def work(call):
        try:
            with memory_guard("encode"), suppress(MemoryError):
                call()
        except Exception as other:
            handled.append(other)

    with pytest.raises(MemoryError) as caught, callback_errors() as outer, callback_errors() as inner:
        work(inner(outer(Raising(problem))))
    assert caught.value is problem and (problem.__cause__, problem.__context__) == (cause, context)
    with callback_errors() as passing:
        assert passing(None) is None and passing(max)(1, 2) == 2
        work(Raising(problem))
        work(Raising(ValueError()))
    assert [type(each) for each in handled] == [ValueError]


def test_an_exception_of_a_callback_holds_no_memory():
    class Large:
        pass

    def work(call, large):
        call()

    def fails():
        raise KeyError

    large = Large()
    gone = weakref.ref(large)
    gc.disable()
    try:
        with suppress(KeyError), callback_errors() as passing:
            work(passing(fails), large)
        del large
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.few(6)
@each_problem
@pytest.mark.parametrize("stage", ["read", "encode", "layers"])
def test_progress_of_encode(qa, problem, stage):
    callback = Raising(problem, stage)
    if stage == "read":  # only reported while the encoder waits for frames
        callback.stage = None
    check_raised(lambda: qa.encode(CLIPS[0], progress=callback), callback)


@pytest.mark.few(3)
@each_problem
def test_callbacks_of_a_batch(qa, problem):
    """They end the batch. Only what goes wrong in a row is recorded in its record."""
    settings = Settings.of(model="demo", device="cpu")
    spans = Span.group(RowReader().pairs(CLIPS, ["What happens?"]))
    progress = Raising(problem)
    check_raised(lambda: list(answers(qa.session, spans, settings, progress=progress)), progress)
    waits, later = count(), Raising(problem)
    second = lambda seconds: next(waits) and later(seconds)  # noqa: E731  the second call reports the time of an encoding
    check_raised(lambda: list(answers(qa.session, spans, settings, on_wait=second)), later)


@pytest.mark.few(3)
@each_problem
def test_progress_of_a_download(problem):
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=b"x" * 100))
    callback = Raising(problem)

    def download():
        with downloaded("http://localhost/a.mp4", progress=callback, transport=transport):
            pass

    check_raised(download, callback)
    within = Raising(problem)  # raised in the block that uses the file

    def use():
        with downloaded("http://localhost/a.mp4", transport=transport):
            within()

    check_raised(use, within)


@pytest.mark.few(3)
@each_problem
def test_progress_of_quantization(problem):
    callback = Raising(problem)
    check_raised(lambda: VideoQA.load("demo", device="cpu", quantize="int8", progress=callback), callback)


@pytest.mark.few(3)
@each_problem
def test_the_time_that_a_live_source_asks_for(problem):
    callback = Raising(problem)
    check_raised(lambda: list(LiveSource(CLIPS[0], timeout_s=1.0).frames(callback)), callback)


@pytest.mark.few(3)
@each_problem
def test_progress_of_an_evaluation(qa, problem):
    row, callback = RowReader().pairs(CLIPS[:1], ["What happens?"])[0], Raising(problem)
    evaluation = Evaluation(EvalSettings("q.jsonl", (0.5,), ("random",)), [VideoQuestions("a", Path(CLIPS[0]), (row,))])
    evaluation.loaded = qa.loaded
    check_raised(lambda: evaluation.run(callback), callback)
    assert not evaluation.samples


def test_an_exception_that_cannot_be_copied():
    """Pydantic's are an example. Reading the answer again raises the same error."""

    class Odd(Exception):
        def __new__(cls, *, needed):
            return super().__new__(cls)

        def __init__(self, *, needed):
            pass

    def pieces():
        yield "a"
        raise problem

    problem = Odd(needed=1)
    answer = Answer(Report(), pieces())
    for _ in range(2):
        with pytest.raises(Odd) as caught:
            list(answer)
        assert caught.value is problem
