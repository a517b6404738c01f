"""docs/json.md names every field that a real output has, and no other; its examples have no field that a real output lacks."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from evoprune.profiling import bench
from tests.cli.test_readme import ROOT

PAGE = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
RECORDS = ("compare",)  # fields that hold a whole record again
SQUARE = str(ROOT / "samples" / "square.mp4")
ROWS = [
    {
        "id": "x",
        "video": SQUARE,
        "question": "What?",
        "options": ["a", "b"],
        "answer": "a",
        "type": "t",
        "groups": ["g"],
    },
    {"id": "y", "video": "gone.mp4", "question": "What?", "answer": "b"},
]
SHORT = ("--frames", "4")


def section(title: str) -> str:
    """What stands below a heading, up to the next one."""
    (found,) = re.findall(rf"^#+ {title}\n(.*?)(?=^#|\Z)", PAGE, re.S | re.M)
    return found


def named(title: str) -> set[str]:
    """The fields in the first columns of the tables of a section."""
    return {
        name for cell in re.findall(r"^\| (`.*?) \|", section(title), re.M) for name in re.findall("`([^`]+)`", cell)
    }


def fields(value: Any, name: str = "") -> Iterator[str]:
    """The names of all fields, as the page writes them; an object that is empty by its own name."""
    if isinstance(value, dict) and value and name not in RECORDS:
        for key, inner in value.items():
            yield from fields(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from fields(inner, f"{name}[]")
    else:
        yield name


def matches(field: str, pattern: str) -> bool:
    """Whether a field is the one that the page names; a part in capitals stands for any name."""
    return bool(re.fullmatch(re.sub("[A-Z]{4}", ".+", re.escape(pattern)), field))


def check(title: str, outputs: list[dict], errors: bool = True) -> None:
    documented = named(title) | (named("Errors") if errors else set())
    real = {field for output in outputs for field in fields(output)}
    parents = {name[: end.start()] for name in documented for end in re.finditer(r"\.|\[\]", name)}  # null, or empty
    assert not [f for f in real - parents if not any(matches(f, name) for name in documented)], "not on the page"
    assert not [name for name in documented if name != "error" and not any(matches(f, name) for f in real)], (
        "do not exist"
    )
    for example in re.findall(r"```json\n(.*?)```", section(title), re.S):
        assert set(fields(json.loads(example))) <= real


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_ask_and_batch(cli, tiny_folder, rows, tmp_path):
    model = ("-m", str(tiny_folder), "-n", "2", *SHORT)
    outputs = [cli("ask", SQUARE, "What?", "--json", "--compare", *model).record]
    assert cli("batch", "--from", str(rows), "-o", str(tmp_path / "o.jsonl"), "-q", *model).code == 6
    check("ask and batch", outputs + records((tmp_path / "o.jsonl").read_text()))


def test_eval(cli, tiny_folder, rows, tmp_path):
    folder = tmp_path / "run"
    sweep = ("-b", "0.5", "--method", "random,pool")
    done = cli(
        "eval", "--data", str(rows), "-m", str(tiny_folder), "-n", "2", *SHORT, *sweep, "-o", str(folder), "--json"
    )
    refused = cli("eval", "--data", str(tmp_path / "none.jsonl"), "--json")
    assert (done.code, refused.code) == (6, 2)
    check("eval", [done.record, refused.record])
    check("Samples", records((folder / "samples.jsonl").read_text()))
    assert json.loads((folder / "settings.json").read_text()) == done.record["settings"]


def test_profile(cli, tiny_folder, monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda *_, **__: 1e11)
    quick = ("-r", "1", "--size", "112x168", "-b", "0.5", "--format", "json", *SHORT)
    check("profile", [cli("profile", "-m", str(tiny_folder), *quick).record], errors=False)


def test_inspect(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("evoprune.methods.plugins", lambda: {"own": "a package"})
    video = cli("inspect", SQUARE, "--scan", "--overlay", str(tmp_path / "a.png"), "--json", *SHORT)
    check("inspect", [cli("inspect", "--json").record, video.record, cli("inspect", "gone.mp4", "--json").record])


def test_errors():
    (example,) = re.findall(r"```json\n(.*?)```", section("Errors"), re.S)
    assert {f"error.{name}" for name in json.loads(example)} == named("Errors")


@pytest.mark.parametrize(
    ("output", "says"), [({"schema": "", "more": 1}, "not on the page"), ({"schema": ""}, "do not exist")]
)
def test_a_missing_and_a_surplus_field_are_found(output, says):
    with pytest.raises(AssertionError, match=says):
        check("profile", [output], errors=False)
