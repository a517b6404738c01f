"""Questions from a file, and what counts as a right answer."""

import json

import pytest

from evoprune.errors import UsageError
from evoprune.evaluation.questions import Item, chosen_option, load_items

FRUIT = ("apple", "a pear", "red plum", "plum")


@pytest.mark.parametrize(
    ("said", "expected", "right"),
    [
        ("green", "green", True),
        (" Green. ", "green", True),
        ("green", "Green.", True),
        ("green!", "green", False),
        ("", "green", False),
        ("light green", "green", False),
    ],
)
def test_open_questions_want_the_exact_words(said, expected, right):
    assert Item("1", "What colour?", expected).grade(said) is right


@pytest.mark.parametrize(
    ("said", "choice"),
    [
        ("B", 1),
        ("b.", 1),
        ("(B)", 1),
        ("**B**", 1),
        ("[b] a pear", 1),
        ("B. apple", 1),  # the letter was asked for
        ("B) a pear", 1),
        ("B: a pear, I think", 1),
        ("B a pear", 1),
        ("apple", 0),
        ("Apple.", 0),
        ("A PEAR", 1),
        ("a pear", 1),  # not the letter A
        ("The answer is C.", 2),
        ("Answer: (d)", 3),
        ("I choose option B, because", 1),
        ("It is an apple", 0),
        ("there is a red plum", None),  # names two of them
        ("plum", 3),
        ("E", None),
        ("A banana", None),
        ("banana", None),
        ("pineapple", None),
        ("apple or plum", None),
        ("", None),
        ("the answer is unclear", None),
        ("Option A or option B", None),
    ],
)
def test_which_option_is_named(said, choice):
    assert chosen_option(said, FRUIT) == choice
    item = Item("1", "Which?", "a pear", FRUIT)
    assert item.grade(said) is (None if choice is None else choice == 1)


def test_an_options_text_goes_before_letters():
    assert chosen_option("B", ("B", "A")) == 0
    assert chosen_option("5", ("4", "5")) == 1


def test_how_it_is_asked():
    assert Item("1", "Which?", "a", ()).prompt == "Which?"
    lines = Item("1", "Which?", "apple", FRUIT).prompt.splitlines()
    assert (
        lines[0] == "Which?"
        and lines[1:5] == ["A. apple", "B. a pear", "C. red plum", "D. plum"]
        and "letter" in lines[5]
    )


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ROW = {"video": "a.mp4", "question": "What?", "answer": "yes"}


def test_a_file_is_read_video_by_video(tmp_path):
    rows = [ROW, ROW | {"video": "b.mp4", "id": 7, "type": "order", "groups": ["time"]}, "", ROW | {"answer": 3}]
    rows.append(ROW | {"options": ["no", "yes", "maybe"], "answer": "b"})
    first, second = load_items(write(tmp_path / "q.jsonl", *rows))
    assert (first.name, first.path) == ("a.mp4", tmp_path / "a.mp4") and second.name == "b.mp4"
    assert [item.id for item in first.items] == ["1", "4", "5"] and second.items[0].id == "7"
    assert first.items[1].answer == "3" and first.items[2].answer == "yes"
    assert (second.items[0].type, second.items[0].groups) == ("order", ("time",))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ({"video": "a.mp4", "question": "What?"}, "no 'answer'"),
        (ROW | {"question": " "}, "question is not a text"),
        (ROW | {"video": 3}, "video is not a text"),
        (ROW | {"options": "yes"}, "options is not a list"),
        (ROW | {"groups": [3]}, "groups is not a list"),
        (ROW | {"options": ["yes"]}, "2 to 26"),
        (ROW | {"options": ["yes", "Yes."]}, "different"),
        (ROW | {"options": ["red", "green"]}, "none of the options"),
        (ROW | {"options": ["red", "green"], "answer": "C"}, "none of the options"),
        (ROW | {"id": 1}, "there twice"),
    ],
)
def test_what_is_no_question(tmp_path, row, says):
    with pytest.raises(UsageError, match=says) as caught:
        load_items(write(tmp_path / "q.jsonl", ROW, row))
    assert caught.value.hint


def test_no_file_and_an_empty_one(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_items(tmp_path / "q.jsonl")
    with pytest.raises(UsageError, match="no questions"):
        load_items(write(tmp_path / "q.jsonl", ""))
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        load_items(tmp_path / "q.jsonl")
