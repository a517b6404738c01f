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
