"""What counts as a right answer."""

import pytest

from evoprune.batch.rows import Row
from evoprune.evaluation.grading import chosen_option, grade

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
    assert grade(Row("1", ("v",), ("v",), "What colour?", answer=expected), said) is right


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
    row = Row("1", ("v",), ("v",), "Which?", options=FRUIT, answer="a pear")
    assert grade(row, said) is (None if choice is None else choice == 1)


def test_an_options_text_goes_before_letters():
    assert chosen_option("B", ("B", "A")) == 0
    assert chosen_option("5", ("4", "5")) == 1
