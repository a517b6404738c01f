import threading

import pytest

from evoprune.video_qa import VideoQA


@pytest.fixture(scope="package")
def qa():
    return VideoQA.load("demo")


@pytest.fixture
def server(qa, tmp_path):
    """A server with the default settings that reads files below `samples`."""
    from tests.plugins.serve.serving import SAMPLES, serving

    with serving(qa, tmp_path, folders=(SAMPLES,)) as running:
        yield running


@pytest.fixture
def slow(monkeypatch):
    """The model waits between pieces until the event is set, for longer than any test."""
    from evoprune_serve import asks, work

    going = threading.Event()
    going.begun = threading.Event()
    usual = work.begun

    class Slow:
        """Stands in for an answer."""

        def __init__(self, *given):
            self._answer = usual(*given)
            self.report, self.close = self._answer.report, self._answer.close

        def __iter__(self):
            going.begun.set()
            for piece in self._answer:
                yield piece
                for _ in range(12_000):
                    if going.wait(0.01):
                        break
                    yield ""  # the server checks here if the client is still connected

    monkeypatch.setattr(work, "begun", Slow)
    monkeypatch.setattr(asks, "begun", Slow)
    yield going
    going.set()
