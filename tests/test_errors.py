"""How errors look in Python, and which attributes survive pickling to another process."""

import json
import pickle
import traceback

import pytest

from evoprune.errors import ModelError, OutOfMemory, UsageError, VideoError, error_record


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


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://user:secret@camera/live",
        "HTTP://secret@host:80/a@b.mp4",
        "https://user:p@secret@host/a",
        "/tmp/http:/user:secret@host/a",
    ],
)
def test_errors_never_show_passwords_in_urls(url):
    problem = VideoError(f"cannot read {url}: it is not there, and neither is {url!r}", f"try {url}")
    for shown in (
        str(problem),
        repr(problem),
        json.dumps(error_record(problem)),
        json.dumps(error_record(OSError(url))),
    ):
        assert "secret" not in shown and ":/" in shown
    assert VideoError("a@b.mp4 and https://host/c@d.mp4").message == "a@b.mp4 and https://host/c@d.mp4"
