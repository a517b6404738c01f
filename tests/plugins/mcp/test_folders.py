"""Which files `evoprune mcp` may read."""

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from evoprune.errors import EvopruneError, UsageError, VideoError
from evoprune.session import PipelineOptions
from evoprune.video import Folder, probe
from evoprune_mcp.folders import Folders, real_paths
from evoprune_mcp.videos import Videos

pytestmark = pytest.mark.skipif(os.name != "posix", reason="symbolic links")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, files are checked but opened by their paths")


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


def read(folders: Folders, *paths: str) -> list[str]:
    with folders.opened(paths) as files:
        return [Path(file).read_text() for file in files]


def refused(folders: Folders, path: str) -> bool:
    try:
        with folders.opened([path]):
            return False
    except UsageError as problem:
        assert f"{path} is no file below an allowed folder" in str(problem)
        return True


def test_a_neighbour_that_is_not_read_with_a_video_may_be_outside(inside, tmp_path):
    """The subtitles next to a video are read with it; other files are not, even if their names begin with the video's name."""
    for name in ("10.mp4", "1.mp4.txt", "1.jpg", "1 (2).srt"):
        (inside / name).symlink_to(tmp_path / "elsewhere.mp4")
    (inside / "10.srt").symlink_to(tmp_path / "elsewhere.srt")
    folders = Folders([str(inside)])
    (inside / "1.mp4").write_text("first")
    assert read(folders, "1.mp4", str(inside / "1.mp4")) == ["first", "first"]
    assert refused(folders, "10.mp4") and refused(folders, "1.jpg")
    (inside / "1.srt").symlink_to(tmp_path / "elsewhere.srt")
    with folders.opened(["1.mp4"], subtitles=False) as (file,):
        assert os.listdir(Path(file).parent) == ["1.mp4"]


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


def test_files_keep_their_names_and_neighbours(inside):
    """Broken links and folders with the name of an image are left out, as everywhere."""
    (inside / "1.en.srt").write_text("spoken")
    (inside / "frames" / "2.png").symlink_to(inside / "frames" / "1.png")
    (inside / "frames" / "3.png").symlink_to(inside / "frames" / "none.png")
    (inside / "frames" / "4.png").mkdir()
    with Folders([str(inside)]).opened(["1.mp4", "frames", "frames/../1.mp4"]) as (video, frames, again):
        assert real_paths(f"{video} {frames}/1.png") == f"{inside}/1.mp4 {inside}/frames/1.png"
        assert real_paths(again) == str(inside / "1.mp4")
        assert Path(video).with_suffix(".en.srt").read_text() == "spoken"
        assert [os.path.basename(image) for image in Folder(frames).images] == ["1.png", "2.png"]
    if video != str(inside / "1.mp4"):
        assert not os.path.lexists(video) and not os.path.exists(frames)


def test_errors_contain_the_real_path(inside):
    with pytest.raises(VideoError, match="is empty") as caught, Folders([str(inside)]).opened(["1.mp4"]) as (file,):
        probe(file)
    assert caught.value.message == f"{inside}/1.mp4 is empty"


def contents(files: list[str]) -> set[str]:
    every = [each for file in files for each in Path(file).parent.rglob("*")]
    return {each.read_text() for each in every if each.is_file()}


@pytest.fixture
def swap(inside, tmp_path):
    """A function that replaces files and folders below `inside` with links to others outside, or puts them back."""
    outside = tmp_path / "outside"
    kept = tmp_path / "kept"
    for top in (inside, outside):
        (top / "sub").mkdir(parents=True)
        (top / "frames").mkdir(exist_ok=True)
        for name in ("1.mp4", "2.mp4", "2.srt", "frames/1.png", "sub/3.mp4"):
            (top / name).write_text(top.name)
    names = ("1.mp4", "2.srt", "frames/1.png", "sub")

    def swapped(away: bool) -> None:
        for number, name in enumerate(names):
            stored = kept.with_suffix(f".{number}")
            if away and not stored.exists():
                (inside / name).rename(stored)
                (inside / name).symlink_to(outside / name)
            elif stored.exists() and not away:
                (inside / name).unlink()
                stored.rename(inside / name)

    return swapped


@LINUX
def test_files_that_are_replaced_after_they_are_opened_are_read_as_they_were(inside, swap):
    with Folders([str(inside)]).opened(["1.mp4", "2.mp4", "frames", "sub/3.mp4"]) as files:
        swap(True)
        assert contents(files) == {"inside"}


@LINUX
@pytest.mark.parametrize("path", ["1.mp4", "2.mp4", "frames", "sub/3.mp4"])
def test_files_that_are_replaced_between_the_check_and_the_opening_are_refused(inside, swap, monkeypatch, path):
    """They are links only while something is opened."""
    usual = os.open

    def opening(*given, **more):
        swap(True)
        try:
            return usual(*given, **more)
        finally:
            swap(False)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "supports_dir_fd", os.supports_dir_fd | {opening})
    with pytest.raises(UsageError, match="is no file below an allowed folder"), Folders([str(inside)]).opened([path]):
        pass


@LINUX
def test_no_image_outside_is_described_while_links_are_replaced(inside, tmp_path):
    """An image and the only image of a folder, by a server that answers while another program replaces them."""
    from PIL import Image

    Image.new("RGB", (64, 48)).save(inside / "kept.png")
    Image.new("RGB", (200, 100)).save(tmp_path / "secret.png")
    (inside / "image.png").write_bytes((inside / "kept.png").read_bytes())
    swapped = (inside / "image.png", inside / "frames" / "1.png")
    ended = threading.Event()

    def swap():
        while not ended.is_set():
            for image in swapped:
                for make, target in (
                    (Path.symlink_to, tmp_path / "secret.png"),
                    (Path.hardlink_to, inside / "kept.png"),
                ):
                    make(inside / "new", target)
                    (inside / "new").replace(image)
                    time.sleep(0.001)

    videos = Videos(Folders([str(inside)]), PipelineOptions(), cache=False, quiet=True)
    widths = set()
    swapping = threading.Thread(target=swap)
    swapping.start()
    end = time.monotonic() + 0.5
    try:
        while time.monotonic() < end:
            for path in ("image.png", "frames"):
                with suppress(EvopruneError):
                    widths.add(videos.describe(path)["width"])
    finally:
        ended.set()
        swapping.join()
    assert widths == {64}


def test_a_list_of_files(inside, tmp_path, monkeypatch):
    for name in ("2.MKV", "10.webm", ".hidden.mp4", "text.txt", "photo.heic"):
        (inside / name).write_text("123")
    (inside / "linked.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    (inside / "sub" / ".git").mkdir(parents=True)
    (inside / "sub" / ".git" / "1.mp4").write_text("")
    (inside / "sub" / "1.mp4").write_text("")
    (inside / "away").symlink_to(tmp_path)
    (inside / "many").mkdir()
    for number in range(21):
        (inside / "many" / f"{number}.jpg").write_text("")
    folders = Folders([str(inside)])
    listing = folders.listed()
    assert [(file.path, file.kind, file.size_bytes) for file in listing.files] == [
        ("1.mp4", "video", 0),
        ("2.MKV", "video", 3),
        ("10.webm", "video", 3),
        ("photo.heic", "image", 3),
        ("frames/1.png", "image", 0),
        ("many", "folder of frames", None),
        ("sub/1.mp4", "video", 0),
    ]
    assert not listing.more and not any(refused(folders, file.path) for file in listing.files)
    assert [file.path for file in folders.listed("sub").files] == ["sub/1.mp4"]
    both = Folders([str(inside / "sub"), str(inside / "frames")])
    assert [file.path for file in both.listed().files] == [f"{inside}/sub/1.mp4", f"{inside}/frames/1.png"]
    for path in ("..", "away", "/", "none", str(tmp_path)):
        with pytest.raises(UsageError, match="below an allowed folder"):
            folders.listed(path)
    lstat = os.lstat

    def refused_lstat(path, **place):
        if path == "2.MKV":
            raise PermissionError(path)
        return lstat(path, **place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "lstat", refused_lstat)
        assert [file.path for file in folders.listed().files][:2] == ["1.mp4", "10.webm"]
    monkeypatch.setattr("evoprune_mcp.folders.MOST_LISTED", 3)
    listing = folders.listed()
    assert listing.more and [file.path for file in listing.files] == ["1.mp4", "2.MKV", "10.webm"]
