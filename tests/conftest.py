import shutil

import pytest

from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A tiny model's folder, not to be touched."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "tiny")
