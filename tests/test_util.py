"""Test the formatting of time estimates, and the parsing of times that users type."""

import json
import time
from contextlib import suppress
from dataclasses import FrozenInstanceError, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from evoprune.errors import UsageError
from evoprune.util import (
    converted,
    did_you_mean,
    from_cell,
    install_hint,
    missing_hint,
    near_file,
    option,
    overlapping,
    parse_time,
    roughly,
    to_cell,
)


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (0.0, "~0 s"),
        (0.04, "~0.04 s"),
        (0.33, "~0.3 s"),
        (0.96, "~1 s"),
        (4.6, "~5 s"),
        (600.0, "~10 min"),
        (9e3, "~2 h"),
    ],
)
def test_an_estimate_has_a_digit_that_is_not_0(seconds, says):
    assert roughly(seconds) == says


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90), ("90.5", 90.5), ("0", 0), ("1:30", 90), ("90:00", 5400), ("01:30:00", 5400), ("1:02:03.5", 3723.5),
        (" 7 ", 7), ("100:00:00", 360000), ("-5", -5), ("-0:05", -5), ("-1:30.5", -90.5), ("-0", 0),
        ("2s", 2), ("-2s", -2), ("0.5s", 0.5), ("1m30s", 90), ("90m", 5400), ("1h2m3.5s", 3723.5), ("-1h5s", -3605),
    ],
)  # fmt: skip
def test_times_are_parsed(text, expected):
    assert parse_time(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "-", "--1", "- 1", "1:-5", "1:", ":30", "1:60", "1:60:00", "1:2:3:4", "1.5:00", "nan", "inf", "1e3", "٣",
        "9" * 400, "s", "1m90s", "1h60m", "1h90s", "1s1m", "1:30s", "1.5m", "500ms", "2 s",
    ],
)  # fmt: skip
def test_what_is_not_a_time_is_refused(text):
    with pytest.raises(UsageError, match="is not a time"):
        parse_time(text)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("holidy.mp4", "holiday.mp4"),
        ("holiday.mov", "holiday.mp4"),
        ("HOLIDAY.MP4", "holiday.mp4"),
        ("nothere.mp4", None),
        ("frame", "frames"),
        ("holiday.mp4", None),
    ],
)
def test_a_path_that_was_probably_meant(tmp_path, name, near):
    for each in ("holiday.mp4", "note.md", "frames"):
        (tmp_path / each).touch()
    assert near_file(str(tmp_path / name)) == (near and str(tmp_path / near))


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("sample/square.mp4", "samples/square.mp4"),
        ("sample/sqare.mp4", "samples/square.mp4"),
        ("./smaples/scene/crosing.mp4", "samples/scenes/crossing.mp4"),
        ("square.mp4", "samples/square.mp4"),
        ("clips/square.mp4", "samples/square.mp4"),
        ("samples/crossing.mp4", "samples/scenes/crossing.mp4"),
        ("videos/README.md", "README.md"),
        ("sample/", "samples"),
        ("dmeo", None),  # README is not near enough
        ("other/nothing.mp4", None),
        ("samples/../samples/square.mp4", None),  # exists
    ],
)
def test_misspelled_and_wrong_folders(tmp_path, monkeypatch, given, near):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples" / "scenes").mkdir(parents=True)
    for each in ("samples/square.mp4", "samples/scenes/crossing.mp4", "README.md"):
        (tmp_path / each).touch()
    found = near_file(given)
    assert (found and str(Path(found))) == near


@pytest.mark.parametrize(
    "recorded", [None, "", '{"url": "https://host/x.whl"}', '{"url": "file:///no/such"}', "folder"]
)
def test_hints_install_extras_from_where_evoprune_came_from(monkeypatch, tmp_path, recorded):
    """No package index has evoprune, so a hint must not name one."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    record = json.dumps({"url": folder.as_uri()}) if recorded == "folder" else recorded
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: SimpleNamespace(read_text=lambda name: record))
    hint = install_hint("speech")
    usual = "in a checkout of evoprune: pip install '.[speech]'"
    assert hint == (f"pip install '{folder}[speech]'" if recorded == "folder" else usual)


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1+1",
        "-",
        "- a dog\n- a cat",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "'=1",
        "''@",
        "＝1",
        "-1+1",
        "-3 dogs",
    ],
)
def test_text_never_becomes_a_formula(text):
    assert to_cell(text) == f"'{text}" and from_cell(to_cell(text)) == text


@pytest.mark.parametrize(
    "value", ["-3", "+3", "-1.5", "-1e-05", "-1,000", "-5%", "", "'", "'tis", "a=b", "1-2", -3, -0.5, None, True]
)
def test_numbers_and_other_text_stay(value):
    assert to_cell(value) is value
    if isinstance(value, str):
        assert from_cell(value) == value


@pytest.mark.parametrize(
    "call",
    [partial(missing_hint, usual=""), partial(did_you_mean, known=["a" * 99]), parse_time],
    ids=["path", "word", "time"],
)
@pytest.mark.parametrize("word", ["a", "a.", "1:", "a://", "/a"])
def test_long_words_take_no_time(call, word):
    begun = time.process_time()
    with suppress(UsageError):
        call(word * 100_000)
    assert time.process_time() - begun < 2


def test_blocks_that_overlap_restore_the_state_once():
    state = ["usual"]

    @overlapping
    def changed():
        before = state[0]
        state[0] = "changed"
        try:
            yield
        finally:
            state[0] = before

    first, second = changed(), changed()
    with first:
        second.__enter__()
    assert state == ["changed"]
    with changed():
        pass
    assert state == ["changed"]
    second.__exit__(None, None, None)
    assert state == ["usual"]
    with suppress(KeyError), changed():
        assert state == ["changed"]
        raise KeyError
    assert state == ["usual"]


@converted
@dataclass(frozen=True)
class Converted:
    path: str | Path = option("a", "A path.", accept=lambda given: given or "none", convert=str)
    count: int = option(1, "A number.", convert=abs)


def test_arguments_are_converted_before_they_are_set():
    """Values are also converted by `replace`. Defaults are in their final form."""
    made = Converted(Path("x"), count=np.int64(-3))
    assert made == Converted(path="x", count=3) and (made.path, made.count, type(made.count)) == ("x", 3, int)
    assert Converted() == Converted("a") and Converted("").path == "none" and Converted().count == 1
    assert replace(Converted(), path=Path("y")) == Converted("y", 1)
    with pytest.raises(UsageError, match="count is 'a', not a whole number"):
        Converted(count="a")
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        Converted(colour="red")
    with pytest.raises(TypeError, match="positional arguments"):
        Converted("a", 1, 2)
    with pytest.raises(FrozenInstanceError):
        made.path = "z"
