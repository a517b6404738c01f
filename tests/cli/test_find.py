"""`evoprune find` on the command line: text, JSON, several videos, and how it ends."""

import json

import pytest

from evoprune.moments.search import Search
from tests.cli.conftest import ROOT

SQUARE = str(ROOT / "samples" / "square.mp4")
THREE = str(ROOT / "samples" / "three.mp4")
GREEN = "a green square"


def test_text_has_times_and_a_bar(cli):
    result = cli("find", SQUARE, GREEN)
    head, line = result.out.splitlines()
    assert (result.code, head) == (0, f"{SQUARE}: {GREEN}")
    assert line.startswith("   0:00.0 - 0:06.0     best 0:0") and line.endswith("#" * 20)
    assert "1 segment of 6 s, 12 frames in each" in result.err


def test_json_has_a_line_a_moment(cli):
    result = cli("find", SQUARE, THREE, "-Q", GREEN, "-Q", "a purple cross", "--json", "-q")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0 and (records[0]["video"], records[0]["query"]) == (SQUARE, GREEN)
    assert all(each["schema"] == "evoprune/find@1" and each["score"] >= 0.9 for each in records)
    assert all(0 <= each["start_s"] <= each["best_s"] <= each["end_s"] for each in records)


def test_nothing_found_is_no_error(cli):
    result = cli("find", SQUARE, "a purple cross")
    assert (result.code, result.out) == (0, "")
    assert "nothing shows 'a purple cross'; the best is 0." in result.err
    assert cli("find", SQUARE, "a purple cross", "-q").err == ""


def test_words_that_a_demo_does_not_know_are_a_warning(cli):
    assert "warning:" in cli("find", SQUARE, "a giraffe", "-q").err


def test_a_folder_of_which_one_video_fails(cli, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "b.mp4").symlink_to(SQUARE)
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
    assert "broken off after 1 of 3 segments" in result.err


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        ((SQUARE,), 2, "nothing to find"),
        (("gone.mp4", GREEN), 3, "no such file: gone.mp4"),
        ((SQUARE, " "), 2, "the query is empty"),
        ((SQUARE, GREEN, "--min-score", "2"), 2, "--min-score is 2"),
        ((SQUARE, GREEN, "--segment", "soon"), 2, "is not a time"),
        ((SQUARE, GREEN, "--prompt", "What?"), 2, "--prompt is 'What?', without the query"),
        ((SQUARE, GREEN, "--yes", "no"), 2, "begin with the same token"),
        ((SQUARE, SQUARE, GREEN), 2, "is there twice"),
    ],
)
def test_what_is_refused(cli, words, code, problem):
    result = cli("find", *words)
    assert (result.code, result.out) == (code, "") and problem in result.err
