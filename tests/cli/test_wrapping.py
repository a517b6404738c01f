"""Answers on a terminal are broken between words; in a pipe they stay as they are."""

import random
import re
import sys

import pytest

from evoprune_cli.terminal import Wrapped, print_stream

TEXT = (
    "A small purple triangle moves up. The digit 2 appears.\n\n  Then: unbreakablewordsarelongerthanaline, and so on."
)


def shown(text: str, width: int, pieces: int = 1) -> str:
    """What is written of a text that comes in pieces of random length."""
    draw, written = random.Random(pieces), []
    wrapped, rest = Wrapped(width, written.append), text
    while rest:
        count = draw.randint(1, 7) if pieces > 1 else len(rest)
        wrapped.add(rest[:count])
        rest = rest[count:]
    wrapped.flush()
    return "".join(written)


@pytest.mark.parametrize("width", [10, 20, 33, 200])
def test_lines_end_between_words(width):
    text = shown(TEXT, width)
    assert text.split() == TEXT.split() and text.count("\n\n") == 1
    for line in text.split("\n"):
        for word in re.finditer(r"\S+", line):  # the terminal breaks at multiples of its width
            assert len(word[0]) > width or word.start() // width == (word.end() - 1) // width
    assert all(shown(TEXT, width, pieces) == text for pieces in range(2, 9))


def test_what_fits_is_not_changed():
    assert shown(TEXT, 500) == TEXT and shown("green", 5) == "green"
    assert shown("ab cd", 5) == "ab cd" and shown("ab cde", 5) == "ab\ncde"


def test_a_word_is_written_as_soon_as_the_next_one_begins():
    written = []
    wrapped = Wrapped(20, written.append)
    wrapped.add("gre")
    assert written == []
    wrapped.add("en ")
    assert written == ["green"]


def test_wide_characters_need_no_spaces():
    assert shown("\u4e00" * 7, 8) == "\u4e00" * 4 + "\n" + "\u4e00" * 3


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_broken_in_a_pipe(monkeypatch, capsys, terminal):
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    print_stream(iter(["one two ", "three", " four\tfive"]))
    assert capsys.readouterr().out == ("one two\nthree four\nfive\n" if terminal else "one two three four\tfive\n")
