"""`evoprune find` on the command line: text, JSON, several videos, and how it ends."""

import json
import sys

import pytest
from PIL import Image

from evoprune.errors import OutOfMemory
from evoprune.moments import Search
from evoprune_cli.find import header
from tests.cli.conftest import ROOT

SQUARE = str(ROOT / "samples" / "square.mp4")
THREE = str(ROOT / "samples" / "three.mp4")
GREEN = "a green square"


def test_text_has_times_and_a_bar(cli):
    result = cli("find", SQUARE, GREEN)
    head, line = result.out.splitlines()
    assert (result.code, head) == (0, f"{SQUARE}: {GREEN}")
    assert line.startswith("   0:00.0 - 0:06.0     best 0:0") and line.endswith("#" * 20)
    assert "1 segment of 6 s, 12 frames each" in result.err


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_lines_fit_into_the_terminal(cli, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, line = cli("find", SQUARE, GREEN).out.splitlines()
    assert len(line) <= columns and "0:00.0 - 0:06.0" in line and "##" in line


def test_a_long_query_is_folded_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    query = "a green square to the left of a red circle"
    assert header("clip.mp4", query) == [f"clip.mp4: {query}"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert header("clip.mp4", query) == ["clip.mp4: a green square to the left of", "  a red circle"]


def test_json_has_a_line_a_moment(cli):
    result = cli("find", SQUARE, THREE, "-Q", GREEN, "-Q", "a purple cross", "--json", "-q")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0 and (records[0]["video"], records[0]["query"]) == (SQUARE, GREEN)
    assert all(each["schema"] == "evoprune/find@1" and each["score"] >= 0.96 for each in records)
    assert all(0 <= each["start_s"] <= each["best_s"] <= each["end_s"] for each in records)


def test_what_top_leaves_out_is_counted(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(Search, "more", lambda self, query: 8)
    chapters = tmp_path / "a.txt"
    result = cli("find", SQUARE, GREEN, "--chapters", str(chapters))
    assert f"{SQUARE}: about 8 more moments show 'a green square' (--top)" in result.err
    assert chapters.read_text().endswith("\n; about 8 more left out by --top\n")
    assert json.loads(cli("find", SQUARE, GREEN, "--json", "-q").out)["more"] == 8


def test_nothing_found_is_no_error(cli):
    result = cli("find", SQUARE, "a purple cross")
    assert (result.code, result.out) == (0, "")
    assert "nothing shows 'a purple cross'; the best score is 0." in result.err
    assert cli("find", SQUARE, "a purple cross", "-q").err == ""


def test_words_that_a_demo_does_not_know_are_a_warning(cli):
    assert "warning:" in cli("find", SQUARE, "a giraffe", "-q").err


def test_a_folder_of_which_one_video_fails(cli, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "b.mp4").symlink_to(SQUARE)
    (tmp_path / "a.jpg").touch()  # an image has no moments
    assert f"{tmp_path}: 2 videos; skipped: a.jpg" in cli("find", str(tmp_path), GREEN).err.replace("\n  ", " ")
    result = cli("find", str(tmp_path), GREEN, "-q")
    assert result.code == 6 and f"{tmp_path / 'b.mp4'}: {GREEN}" in result.out and "error:" in result.err


def test_ctrl_c_prints_what_was_found_so_far(cli, monkeypatch):
    def interrupted(self, progress=None):
        for query in self._scores:
            self._scores[query].append(9.0)
        self.asked = 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "run", interrupted)
    result = cli("find", SQUARE, GREEN, "--segment", "2s")
    assert result.code == 130 and "0:00.0 - 0:02.0" in result.out
    assert "stopped after 1 of 3 segments" in result.err


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        ((SQUARE,), 2, "nothing to find"),
        (("gone.mp4", GREEN), 3, "no such file: gone.mp4"),
        (("gone.mp4", SQUARE, "b.mp4", GREEN), 3, "no such file: gone.mp4, b.mp4\n"),
        (
            (SQUARE, "a red circle", GREEN),
            3,
            "no such file: a red circle\nhint: put -Q before each question: evoprune find ",
        ),
        ((SQUARE, " "), 2, "the query is empty"),
        ((SQUARE, GREEN, "--min-score", "2"), 2, "--min-score is 2"),
        ((SQUARE, GREEN, "--segment", "soon"), 2, "is not a time"),
        ((SQUARE, GREEN, "--prompt", "What?"), 2, "--prompt is 'What?', without {} for the query"),
        ((SQUARE, GREEN, "--yes", "no"), 2, "begin with the same token"),
        ((SQUARE, SQUARE, GREEN), 2, "is given twice"),
    ],
)
def test_what_is_refused(cli, words, code, problem):
    result = cli("find", *words)
    assert (result.code, result.out) == (code, "") and problem in result.err


def test_a_file_of_videos_that_can_be_resumed(cli, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "b.mp4").symlink_to(SQUARE)
    out = tmp_path / "found" / "out.jsonl"
    out.parent.mkdir()
    words = ("find", str(tmp_path), GREEN, "-q", "-o", str(out))
    assert cli(*words).code == 6
    failed, found = [json.loads(line) for line in out.read_text().splitlines()]
    assert failed["moments"] is None and failed["error"]["type"] == "video" and found["error"] is None
    assert found["batch"]["row"]["question"] == GREEN and [each["query"] for each in found["moments"]] == [GREEN]
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "a.mp4").symlink_to(THREE)
    again = cli(*words[:3], "--resume", "-o", str(out))
    assert again.code == 0 and "already has 1 of 2 videos" in again.err and "b.mp4" not in again.out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["error"] for record in records] == [None, None] and records[0] == found
    assert cli(*words, "--resume").out == ""


def test_other_queries_are_added_to_the_file_and_other_settings_refused(cli, tmp_path):
    out = tmp_path / "out.jsonl"
    words = ("find", SQUARE, "-q", "-o", str(out))
    assert cli(*words, GREEN).code == 0
    assert "already exists" in cli(*words, GREEN).err
    assert cli(*words, "a red ring", "--resume").code == 0 and out.read_text().count("\n") == 2
    assert "other settings: top was 10" in cli(*words, GREEN, "--resume", "--top", "3").err
    assert cli(*words, "a red ring", "--overwrite").code == 0 and "a red ring" in out.read_text()
    out.write_text("something else\n")
    assert "contains no records of a search" in cli(*words, GREEN, "--overwrite").err


def test_segments_are_kept_on_disk(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    assert cli("find", SQUARE, GREEN, "--cache", "-q").code == 0
    assert list((tmp_path / "segments").glob("*.safetensors"))
    assert cli("inspect", "--clear-cache").code == 0
    assert not list((tmp_path / "segments").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--resume",), "apply to an output file"),
        (("-o", "-"), "-o needs a file"),
        (("-o", SQUARE), "is one of the inputs"),
        (("-o", "x.jsonl", "--resume", "--overwrite"), "cannot be combined"),
    ],
)
def test_outputs_that_make_no_sense(cli, words, problem):
    result = cli("find", SQUARE, GREEN, *words)
    assert (result.code, result.out) == (2, "") and problem in result.err


def test_an_image_among_videos_is_a_failure_of_its_own(cli, tmp_path):
    """A GIF of one frame is an image. The record of the failure does not end later runs."""
    for name in ("a.mp4", "c.mp4"):
        (tmp_path / name).symlink_to(SQUARE)
    Image.new("P", (112, 112)).save(tmp_path / "b.gif")
    out = tmp_path / "out.jsonl"
    for _ in range(2):
        result = cli("find", str(tmp_path), GREEN, "-o", str(out), "--resume", "-q")
        assert result.code == 6 and "b.gif is an image, which has no moments" in result.err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    failed = [record["batch"]["row"]["video"] for record in records if record["error"]]
    assert failed == [str(tmp_path / "b.gif")] and len(records) == 3


def test_memory_that_ends_with_one_video_does_not_end_the_others(cli, tmp_path, monkeypatch):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).symlink_to(SQUARE)
    run = Search.run

    def failing(self, progress=None):
        if self.name.endswith("a.mp4"):
            raise OutOfMemory("no memory", "use less")
        return run(self, progress)

    monkeypatch.setattr(Search, "run", failing)
    result = cli("find", str(tmp_path), GREEN, "-q")
    assert result.code == 6 and "no memory" in result.err and f"{tmp_path / 'b.mp4'}: {GREEN}" in result.out


def test_a_single_video_that_fails_has_a_record(cli, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    result = cli("find", str(tmp_path / "a.mp4"), GREEN, "-q", "-o", str(tmp_path / "out.jsonl"))
    assert result.code == 3 and json.loads((tmp_path / "out.jsonl").read_text())["error"]["code"] == 3


@pytest.mark.parametrize("words", [(SQUARE, GREEN, "-Q", GREEN), ("b.png", GREEN), (SQUARE, GREEN, "--decoder", "x")])
def test_what_is_wrong_is_said_before_weights_are_read(cli, tmp_path, monkeypatch, words):
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (112, 112)).save("b.png")
    assert cli("find", *words).code in (2, 3)


def test_hints_name_only_options_of_find(cli, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.mp4").symlink_to(SQUARE)
    result = cli("find", str(tmp_path), GREEN)
    assert result.code in (2, 3) and "no videos or images" in result.err and "-r also" not in result.err
