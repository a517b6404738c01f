"""Word errors are counted as usual."""

import pytest

from experiments.accuracy.speech import word_errors, words


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ("The boy was there.", "the boy, was there", 0),
        ("it's a well", "it's well", 1),
        ("a b c d", "a x c d e", 2),
        ("", "a b", 2),
        ("a b", "", 2),
    ],
)
def test_word_errors(said, heard, errors):
    assert word_errors(words(said), words(heard)) == errors
