import av  # noqa: F401  imported before decord, whose older codec libraries would otherwise replace PyAV's
import pytest

from evoprune.video.readers.track import Track
from evoprune.video.sandbox import isolation


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture
def in_process(monkeypatch):
    """Read videos in the test process instead of a worker process, so that tests can patch and observe the readers."""
    monkeypatch.setattr(isolation, "POSSIBLE", False)


@pytest.fixture
def decoded(in_process, monkeypatch):
    """A list with one number, which counts the frames that have been decoded."""
    count, original = [0], Track._decoded

    def counting(*args):
        for frame in original(*args):
            count[0] += 1
            yield frame

    monkeypatch.setattr(Track, "_decoded", counting)
    return count
