"""Which folders are videos, and which stand for the videos in them."""

import pytest

from evoprune.batch.rows import Wrong, in_folders, left_out
from evoprune.errors import UsageError


def named(folder, *names: str) -> list[str]:
    for name in names:
        (folder / name).touch()
    wrong = Wrong()
    found = list(in_folders([str(folder), "gone.mp4"], wrong))
    wrong.check({})
    assert found.pop() == "gone.mp4"
    return found


def test_a_folder_of_images_is_one_video(tmp_path):
    assert named(tmp_path, "1.png", "2.JPG", "times.txt") == [str(tmp_path)]


def test_a_folder_of_videos_is_all_of_them_in_natural_order(tmp_path):
    (tmp_path / "3.mp4").mkdir()
    assert named(tmp_path, "10.mkv", "2.mp4", "1.webm", ".0.mp4") == [
        f"{tmp_path}/{name}" for name in ("1.webm", "2.mp4", "10.mkv")
    ]


def test_thumbnails_among_videos_are_left_out_and_counted(tmp_path):
    (tmp_path / "folder").mkdir()
    assert named(tmp_path, "a.mp4", "b.mp4", "a.jpg", "notes.txt", ".c.mp4") == [
        f"{tmp_path}/a.mp4",
        f"{tmp_path}/b.mp4",
    ]
    assert left_out(str(tmp_path)) == f"{tmp_path}: 2 videos; left out: 1 folder, 2 other files"


@pytest.mark.parametrize("names", [["a.mp4"], ["a.png", "times.txt"]])
def test_nothing_is_left_out_of_a_folder_of_one_kind(tmp_path, names):
    assert named(tmp_path, *names) and not left_out(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.mp4", "b.mp4", "a.jpg", "b.jpg"], "holds 2 images and 2 videos"),
        (["a.txt"], "neither videos nor images in the folder"),
    ],
)
def test_other_folders_are_refused(tmp_path, names, says):
    with pytest.raises(UsageError, match=says) as caught:
        named(tmp_path, *names)
    assert caught.value.hint
