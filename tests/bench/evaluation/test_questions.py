"""Questions with known answers, from a file."""

import json

import pytest

from evoprune.bench.evaluation.questions import load_questions
from evoprune.errors import UsageError


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ROW = {"video": "a.mp4", "question": "What?", "answer": "yes"}


def test_a_file_is_read_video_by_video(tmp_path):
    rows = [ROW, ROW | {"video": "b.mp4", "id": 7, "type": "order", "groups": ["time"]}, "", ROW | {"answer": 3}]
    rows.append(ROW | {"options": ["no", "yes", "maybe"], "answer": "b"})
    rows.append(ROW | {"options": ["B", "A"], "answer": "B"})  # a text goes before a letter
    first, second = load_questions(write(tmp_path / "q.jsonl", *rows))
    assert (first.name, first.path) == ("a.mp4", tmp_path / "a.mp4") and second.name == "b.mp4"
    assert [row.id for row in first.rows] == ["1", "4", "5", "6"] and second.rows[0].id == "7"
    assert first.rows[1].answer == "3" and [row.answer for row in first.rows[2:]] == ["yes", "B"]
    assert (second.rows[0].type, second.rows[0].groups) == ("order", ("time",))


def test_options_with_letters(tmp_path):
    options = ["A. red", "B. blue"]
    answers = ["A", "A. red", "red", "(B)", "blue"]
    rows = [ROW | {"options": options, "answer": answer} for answer in answers]
    (video,) = load_questions(write(tmp_path / "q.jsonl", *rows))
    assert [row.answer for row in video.rows] == ["red", "red", "red", "blue", "blue"]
    assert all(row.options == ("red", "blue") for row in video.rows)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ({"video": "a.mp4", "question": "What?"}, "line 2: no answer"),
        (ROW | {"question": " "}, "question is empty"),
        (ROW | {"video": 3}, "video is not a text"),
        (ROW | {"options": "yes"}, "options are not a list"),
        (ROW | {"groups": [3]}, "groups is not a list"),
        (ROW | {"options": ["yes"]}, "2 to 26"),
        (ROW | {"options": ["yes", "Yes."]}, "different"),
        (ROW | {"options": ["red", "green"]}, "none of the options"),
        (ROW | {"options": ["red", "green"], "answer": "C"}, "none of the options"),
        (ROW | {"id": 1}, "the same id"),
    ],
)
def test_wrong_questions_are_refused(tmp_path, row, says):
    with pytest.raises(UsageError, match=says) as caught:
        load_questions(write(tmp_path / "q.jsonl", ROW, row))
    assert caught.value.hint


def test_no_file_and_an_empty_one(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_questions(tmp_path / "q.jsonl")
    with pytest.raises(UsageError, match="holds no rows"):
        load_questions(write(tmp_path / "q.jsonl", ""))
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        load_questions(tmp_path / "q.jsonl")


def test_all_wrong_questions_are_counted(tmp_path):
    with pytest.raises(UsageError, match=r"line 1: no video; line 3: no answer"):
        load_questions(write(tmp_path / "q.jsonl", {}, ROW, ROW | {"answer": None}))


def test_csv(tmp_path):
    lines = [
        "video,question,answer,options,groups,type",
        "a.mp4,Which?,b,red| blue,time|space,order",
        "a.mp4,What?,yes,,,",
    ]
    path = tmp_path / "q.csv"
    path.write_text("\n".join(lines) + "\n")
    (video,) = load_questions(path)
    first, second = video.rows
    assert (first.options, first.answer, first.groups, first.type) == (
        ("red", "blue"),
        "blue",
        ("time", "space"),
        "order",
    )
    assert (second.id, second.options, second.answer, second.groups, second.type) == ("3", (), "yes", (), None)
