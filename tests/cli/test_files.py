"""Files that commands write: which are never replaced, and which are."""

import json
from pathlib import Path

import pytest

from evoprune_cli.files import MARK, write_bytes

SAMPLES = Path("samples")
QUICK = ("-m", "demo", "-b", "0.25", "--frames", "4", "-r", "1", "-w", "0", "-q")
TUNE = ("-m", "demo", "-b", "0.5", "--frames", "4", "-Q", "What digit is it?", "--agree", "0.05", "--no-save", "-q")


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes((SAMPLES / "square.mp4").read_bytes())
    return path


def commands(clip: Path, target: Path) -> dict[str, tuple]:
    """Every way to name a file that is written; none of them has begun to compute when it refuses."""
    return {
        "tune -o": ("tune", clip, *TUNE, "-o", target),
        "tune --chart": ("tune", clip, *TUNE, "--chart", target),
        "profile -o": ("profile", clip, *QUICK, "-o", target),
        "profile --chart": ("profile", clip, *QUICK, "--chart", target),
        "eval --chart": ("eval", "--data", "samples/questions.jsonl", "--chart", target),
        "inspect --overlay": ("inspect", clip, "--overlay", target),
    }


@pytest.mark.parametrize("what", commands(Path(), Path()))
def test_a_file_of_the_user_is_never_replaced(cli, clip, tmp_path, what):
    other = tmp_path / ("other.svg" if "chart" in what else "other.mp4")
    other.write_bytes(clip.read_bytes())
    result = cli(*commands(clip, other)[what])
    assert result.code == 2 and f"{other} is there, and evoprune did not write it" in result.err
    assert other.read_bytes() == clip.read_bytes() and sorted(tmp_path.iterdir()) == [clip, other]


@pytest.mark.parametrize("what", ["tune -o", "profile -o", "inspect --overlay"])
def test_an_input_is_never_replaced(cli, clip, tmp_path, what):
    clip.write_bytes(clip.read_bytes() + MARK)  # as if it had been written here
    before = clip.read_bytes()
    (tmp_path / "link.mp4").symlink_to(clip)
    for target in (clip, tmp_path / "link.mp4"):
        result = cli(*commands(clip, target)[what])
        assert result.code == 2 and f"{target} would change what is read" in result.err
    assert clip.read_bytes() == before


def test_questions_are_never_replaced(cli, tmp_path):
    data = tmp_path / "questions.svg"
    data.write_text("{}")
    assert "would change what is read" in cli("eval", "--data", data, "--chart", data).err
    assert data.read_text() == "{}"


@pytest.mark.few(2)
@pytest.mark.parametrize("ending", [".png", ".gif", ".mp4"])
def test_an_overlay_replaces_an_overlay(cli, clip, tmp_path, ending):
    drawn = tmp_path / f"drawn{ending}"
    drawn.touch()  # an empty file holds nothing
    for budget in ("0.25", "0.5"):
        result = cli("inspect", clip, "--overlay", drawn, "-b", budget, "--frames", "4", "--json")
        assert result.code == 0 and result.record["overlay"]["budget"] == float(budget)


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["table", "json"])
def test_tables_and_charts_replace_their_like(cli, clip, tmp_path, form):
    table, chart = tmp_path / "a.txt", tmp_path / "a.svg"
    for _ in range(2):
        command = ("profile", clip, *QUICK, "--method", "divprune", "--format", form)
        assert cli(*command, "-o", table, "--chart", chart).code == 0
    assert MARK in table.read_bytes() and MARK in chart.read_bytes()


def test_what_was_there_stays_where_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(Exception, match=r"cannot write .*No space left"):
        write_bytes(str(path), json.dumps("new").encode())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
