import av  # noqa: F401  before decord, whose older codec libraries would replace those of PyAV
import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")
