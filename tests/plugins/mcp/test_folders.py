"""Which files `evoprune mcp` may read."""

import os

import pytest

from evoprune.errors import UsageError
from evoprune_mcp.folders import Folders

pytestmark = pytest.mark.skipif(os.name != "posix", reason="symbolic links")


@pytest.fixture
def inside(tmp_path):
    """A folder that may be read, with a video and a folder of frames, and files outside it."""
    for name in ("elsewhere.mp4", "elsewhere.srt", "elsewhere.png"):
        (tmp_path / name).write_text("")
    folder = tmp_path / "inside"
    (folder / "frames").mkdir(parents=True)
    (folder / "1.mp4").write_text("")
    (folder / "frames" / "1.png").write_text("")
    return folder


def refused(folders: Folders, path: str) -> bool:
    try:
        folders.find(path)
    except UsageError as problem:
        assert f"{path} is no file below an allowed folder" in str(problem)
        return True
    return False


def test_a_neighbour_that_is_not_read_with_a_video_may_be_outside(inside, tmp_path):
    """The subtitles next to a video are read with it; other files are not, even if their names begin with the video's name."""
    for name in ("10.mp4", "1.mp4.txt", "1.jpg", "1 (2).srt"):
        (inside / name).symlink_to(tmp_path / "elsewhere.mp4")
    (inside / "10.srt").symlink_to(tmp_path / "elsewhere.srt")
    folders = Folders([str(inside)])
    assert folders.find("1.mp4") == str((inside / "1.mp4").resolve())
    assert refused(folders, "10.mp4") and refused(folders, "1.jpg")


@pytest.mark.parametrize("name", ["1.srt", "1.SRT", "1.en.vtt", "1.pt-BR.ass", "frames.srt", "frames/2.png"])
def test_what_is_read_with_a_path_must_be_inside(inside, tmp_path, name):
    folders = Folders([str(inside)])
    path = "frames" if name.startswith("frames") else "1.mp4"
    link = inside / name
    link.symlink_to(tmp_path / f"elsewhere{link.suffix.lower()}")
    assert refused(folders, path)
    link.unlink()
    (inside / "other").write_text("")
    link.symlink_to(inside / "other")
    assert not refused(folders, path)
