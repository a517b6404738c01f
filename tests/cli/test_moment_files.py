"""Output files of `evoprune find`: their content, when none are written, and that no file of a user is replaced."""

import json
import os
from pathlib import Path

import pytest

from evoprune.moments import Search
from evoprune.video import clips, probe
from tests.cli.conftest import ROOT

SQUARE = str(ROOT / "samples" / "square.mp4")
THREE = str(ROOT / "samples" / "three.mp4")
GREEN = "a green square"


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The working directory of the command, with `folder/` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    return tmp_path


def test_every_file(cli, there):
    files = ("--srt", "a.srt", "--chapters", "a.txt", "--contact-sheet", "a.png", "--clips", "clips")
    result = cli("find", SQUARE, GREEN, *files)
    assert result.code == 0 and result.out.splitlines()[0] == f"{SQUARE}: {GREEN}"
    assert "1 clip in clips" in result.err
    assert (there / "a.srt").read_text().endswith("\na green square (1.00)\n")
    assert "title=a green square\n" in (there / "a.txt").read_text()
    assert (there / "a.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir("clips") == ["square-00-00-00.000.mp4"]
    assert probe("clips/square-00-00-00.000.mp4").tags["title"] == GREEN


def test_clips_of_several_videos_and_what_begins_early(cli, there):
    result = cli("find", SQUARE, THREE, GREEN, "-Q", "a 3", "--clips", "folder", "--start", "1.5")
    assert result.code == 0 and "which start at keyframes, up to 1." in result.err
    assert os.listdir("folder") and all(name.startswith(("square-", "three-")) for name in os.listdir("folder"))
    exact = cli(
        "find", SQUARE, GREEN, "--clips", "exact", "--exact", "--start", "1.5", "-q", "--json", "-o", "found.jsonl"
    )
    moment = json.loads(exact.out)
    assert os.path.isfile(moment["clip"]) and os.path.dirname(moment["clip"]) == "exact"
    (line,) = Path("found.jsonl").read_text().splitlines()
    assert json.loads(line)["moments"] == [moment]
    (name,) = os.listdir("exact")
    assert (exact.code, exact.err) == (0, "") and probe(f"exact/{name}").duration_s == pytest.approx(4.5, abs=0.01)


def test_where_nothing_is_found_there_is_no_file(cli, there):
    words = ("--srt", "a.srt", "--clips", "clips", "--contact-sheet", "a.png")
    assert cli("find", SQUARE, "a purple cross", *words).code == 0
    assert os.listdir() == ["folder"]


@pytest.mark.full
def test_a_contact_sheet_is_drawn_anew_and_no_other_file_is_replaced(cli, there):
    for _ in range(2):
        assert cli("find", SQUARE, GREEN, "--contact-sheet", "a.png", "-q").code == 0
    (there / "b.png").write_bytes(b"\x89PNG of mine")
    (there / "a.srt").write_text("mine")
    for words in (("--contact-sheet", "b.png"), ("--srt", "a.srt"), ("--chapters", "a.srt")):
        result = cli("find", SQUARE, GREEN, *words)
        assert (result.code, result.out) == (2, "") and "already exists" in result.err
    assert (there / "a.srt").read_text() == "mine" and (there / "b.png").read_bytes() == b"\x89PNG of mine"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((SQUARE, THREE, GREEN, "--srt", "a.srt"), "--srt takes one video, but there are 2"),
        ((SQUARE, THREE, GREEN, "--contact-sheet", "a.png"), "--contact-sheet takes one video"),
        ((SQUARE, GREEN, "--contact-sheet", "a.jpg"), "is not a PNG file"),
        ((SQUARE, GREEN, "--srt", "a.txt", "--chapters", "./a.txt"), "two options name the same file"),
        ((SQUARE, GREEN, "--srt", "a.txt", "-o", "a.txt"), "two options name the same file"),
        ((SQUARE, GREEN, "--exact"), "--exact applies only to clips"),
        ((SQUARE, GREEN, "--clips", ""), "name of an output is empty"),
        ((SQUARE, GREEN, "--clips", SQUARE), "cannot write"),
        ((SQUARE, GREEN, "--chapters", "gone/a.txt"), "cannot write gone/a.txt"),
        ((SQUARE, GREEN, "--srt", SQUARE), "already exists"),
    ],
)
def test_what_is_refused(cli, there, words, problem):
    result = cli("find", *words)
    assert (result.code, result.out) == (2, "") and problem in result.err
    assert os.listdir() == ["folder"]


def test_clips_of_a_folder_of_images_are_refused(cli, there, photo):
    os.rename(photo, "folder/1.jpg")
    assert "is a folder of images" in cli("find", "folder", GREEN, "--clips", "clips").err


def test_ctrl_c_writes_no_file_while_it_searches(cli, there, monkeypatch):
    def interrupted(self, progress=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "run", interrupted)
    assert cli("find", SQUARE, GREEN, "--srt", "a.srt", "--clips", "clips").code == 130
    assert os.listdir() == ["folder"]


def test_ctrl_c_while_clips_are_cut(cli, there, monkeypatch):
    """Moments found so far are on stdout, whole files stay, and nothing else is left."""
    stream = clips.stream_clip
    cut = []

    def pieces(info, how):
        cut.append(how)
        every = stream(info, how)
        yield next(every)
        if len(cut) == 2:
            raise KeyboardInterrupt
        yield from every

    monkeypatch.setattr(clips, "stream_clip", pieces)
    result = cli("find", SQUARE, GREEN, "-Q", "Is there a green square?", "--clips", "clips")
    assert result.code == 130 and result.out.count("best") == 2
    assert os.listdir("clips") == ["square-00-00-00.000.mp4"]
