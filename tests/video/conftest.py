import av  # noqa: F401  before decord, whose older codec libraries would replace those of PyAV
import pytest

from evoprune.video.sandbox import isolation


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture
def in_process(monkeypatch):
    """Videos are read in this process, where a test can look on."""
    monkeypatch.setattr(isolation, "POSSIBLE", False)
