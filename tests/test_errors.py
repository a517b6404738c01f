"""How errors look in Python, and which attributes survive pickling to another process."""

import pickle
import traceback

import pytest

from evoprune.errors import ModelError, OutOfMemory, UsageError, VideoError


@pytest.mark.parametrize("kind", [UsageError, VideoError, ModelError, OutOfMemory])
@pytest.mark.parametrize("again", [False, True], ids=["here", "from another process"])
def test_a_traceback_ends_with_the_hint(kind, again):
    problem = kind("no such thing", "take another", stage="decode")
    if again:
        problem = pickle.loads(pickle.dumps(problem))
    assert str(problem) == "no such thing\nhint: take another"
    assert (problem.hint, problem.stage) == ("take another", "decode")
    *_, message, hint = "".join(traceback.format_exception(problem)).splitlines()
    assert message == f"evoprune.errors.{kind.__name__}: no such thing" and hint == "hint: take another"


def test_a_changed_message_is_the_one_that_is_shown():
    problem = VideoError("/tmp/x is no video")
    problem.message = "standard input is no video"
    assert str(problem) == "standard input is no video"
