"""Test that JSON is parsed strictly."""

import json

import pytest

from evoprune.untrusted import MAX_BYTES, MAX_LEVELS, loads, read_object


@pytest.mark.parametrize(
    "text",
    [
        "[NaN]",
        '{"a": Infinity}',
        "-Infinity",
        "1e999",
        "[" * 150 + "]" * 150,
        "[" * 10**6,
        '{"a":' * 5000,
        "9" * 5000,
        "{",
        "",
    ],
    ids=lambda text: f"{text[:16]}... {len(text)}" if len(text) > 16 else text,
)
def test_what_is_refused(text):
    with pytest.raises(ValueError):  # json.JSONDecodeError is a ValueError too
        loads(text)


@pytest.mark.parametrize(
    "value", [{"a": [1, 2.5, None, True, "NaN"]}, 1e300, [], "", json.loads("[" * MAX_LEVELS + "]" * MAX_LEVELS)]
)
def test_what_is_read(value):
    assert loads(json.dumps(value)) == value


def test_files_of_any_kind(tmp_path):
    (tmp_path / "list").write_text("[]")
    (tmp_path / "long").touch()
    with open(tmp_path / "long", "r+b") as file:
        file.truncate(MAX_BYTES + 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("list", "long", "folder", "loop", "device", "missing"):
        with pytest.raises((ValueError, OSError)):
            read_object(tmp_path / name)
