"""docs/json.md names exactly the fields of real output, and its examples have no other fields."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli.conftest import ROOT
from tests.recipes import write_recipe

pytestmark = pytest.mark.full

PAGE = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
RECORDS = ("compare",)  # fields that contain a whole record again
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
LISTED = (
    "finish_reason",
    "warnings",
    "cache",
    "video.decoder",
    "pruning.positions",
    "error.type",
)  # with all their values
SAID = {"id": "z", "video": SQUARE, "question": "What?", "subtitles": "auto"}
BOTH = {"id": "w", "inputs": [SQUARE, SQUARE], "question": "What?"}
OWN = [
    {"id": "v", "video": SQUARE, "question": "What?", "fps": 1, "frame_rate": 3, "max_new_tokens": 1},
    {"id": "u", "video": SQUARE, "question": "What?", "frames": 4},
]
TALK = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "A."},
    {"role": "user", "content": "Why?"},
]
CHAT = {"id": "t", "video": SQUARE, "messages": TALK}
TYPES = {"text": str, "integer": int, "number": (int, float), "boolean": bool, "list": list, "object": dict}
SHORT = ("--frames", "4")


def section(title: str) -> str:
    """Return the text below a heading, up to the next one."""
    (found,) = re.findall(rf"^#+ {title}\n(.*?)(?=^#|\Z)", PAGE, re.S | re.M)
    return found


def named(title: str) -> dict[str, str]:
    """Return the fields in the tables of a section, with their types."""
    found = {}
    for cell, kinds in re.findall(r"^\| (`.*?) \| (.*?) ?\|", section(title), re.M):
        names, each = re.findall("`([^`]+)`", cell), kinds.split(", ")
        found |= dict(zip(names, each * len(names) if len(each) == 1 else each, strict=len(each) > 1))
    return found


def unlisted(title: str, real: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the values of fields in `LISTED` that the page does not mention next to the field."""
    page, missing = section(title) + section("Errors"), []
    for field, value in real:
        if field in LISTED and (row := re.search(rf"^\| [^|]*`{re.escape(field)}`.*", page, re.M)):
            given = value if isinstance(value, list) else [value]
            missing += [(field, each) for each in given if each is not None and f"`{each}`" not in row[0]]
    return missing


def fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all fields with their values, named as on the page. An empty object is a field of its own."""
    if isinstance(value, dict) and value and name not in RECORDS:
        for key, inner in value.items():
            yield from fields(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from fields(inner, f"{name}[]")
    else:
        yield name, value


def matches(field: str, pattern: str) -> bool:
    """Return whether a field matches the page's name for it. Parts in capitals stand for any name."""
    return bool(re.fullmatch(re.sub("[A-Z]{4}", ".+", re.escape(pattern)), field))


def fits(value: Any, kind: str) -> bool:
    """Return whether a value has the type stated on the page. No type is stated if the page refers to another table."""
    if kind in ("", "any") or value is None:
        return kind in ("", "any") or kind.endswith("?")
    words = kind.rstrip("?").split(" or ")
    return any(isinstance(value, TYPES[word.split()[0]]) for word in words) and (
        words == ["boolean"] or not isinstance(value, bool)
    )


def check(title: str, outputs: list[dict], errors: bool = True) -> None:
    common = named("Common fields")
    documented = common | named(title) | (named("Errors") if errors else {})
    real = [found for output in outputs for found in fields(output)]
    parents = {name[: end.start()] for name in documented for end in re.finditer(r"\.|\[\]", name)}  # null, or empty
    known = {field for field, _ in real}
    kinds = {field: [kind for name, kind in documented.items() if matches(field, name)] for field in known}
    assert not [field for field in known - parents if not kinds[field]], "not on the page"
    must = (
        documented if title == "eval" else documented.keys() - (common.keys() - named(title).keys())
    )  # eval has them all
    assert not [name for name in must if name != "error" and not any(matches(f, name) for f in known)], "do not exist"
    assert not unlisted(title, real), "not listed"
    assert not [(f, value) for f, value in real for kind in kinds[f] if not fits(value, kind)], "of another type"
    for example in re.findall(r"```json\n(.*?)```", section(title), re.S):
        assert {field for field, _ in fields(json.loads(example))} <= known


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.full
def test_ask_and_batch(cli, tiny_folder, rows, tmp_path):
    model = ("-m", str(tiny_folder), "-n", "2", *SHORT)
    subtitles = tmp_path / "said.vtt"
    subtitles.write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nHello\n")
    more = ("--compare", "--subtitles", str(subtitles), "--logprobs", "1", "--stop", "never said")
    outputs = [cli("ask", SQUARE, "What?", "--json", *more, *model).record]
    outputs.append(cli("ask", SQUARE, "What?", "--json", "--choices", "a,b", *model).record)
    inner = ("-m", str(tiny_folder), *SHORT, "--method", "evoprune+fastv")
    outputs.append(cli("ask", SQUARE, "What?", "--json", *inner).record)
    outputs.append(
        cli("watch", SQUARE, "-Q", "What?", "--json", "-m", str(tiny_folder), "-n", "2", "--fps", "1").record
    )
    outputs.append(cli("ask", SQUARE, "What?", "--json", *inner[:-1], write_recipe(tmp_path)).record)
    rows.write_text("".join([rows.read_text(), *(json.dumps(row) + "\n" for row in (SAID, BOTH, *OWN, CHAT))]))
    assert cli("batch", "--from", str(rows), "-o", str(tmp_path / "o.jsonl"), "-q", *model).code == 6
    captions = ("-Q", "What?", "-o", str(tmp_path / "c.jsonl"), "--captions", str(tmp_path / "captions"))
    assert cli("batch", SQUARE, *captions, "-q", *model).code == 0
    answered = [*records((tmp_path / "o.jsonl").read_text()), *records((tmp_path / "c.jsonl").read_text())]
    check("ask and batch", outputs + answered)


def test_find(cli, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    found = cli("find", SQUARE, str(broken), "a green square", "--json", "-q")
    refused = cli("find", "gone.mp4", "a green square", "--json")
    assert (found.code, refused.code) == (6, 3)
    check("find", [*records(found.out), refused.record])


def test_output_of_find(cli, tmp_path):
    out = tmp_path / "out.jsonl"
    assert cli("find", SQUARE, "a green square", "-q", "-o", str(out)).code == 0
    (record,) = records(out.read_text())
    assert {"schema", "id", "moments", "error", "model", "batch"} == record.keys()
    assert record["moments"] and record["batch"].keys() == {"row", "settings", "files"}
    assert "evoprune/found@1" in section("Output of find") and record["schema"] == "evoprune/found@1"


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


@pytest.mark.full
def test_tune(cli, tiny_folder):
    asked = ("-m", str(tiny_folder), "-b", "0.2", "-Q", "What?", "--json", *SHORT)
    done = cli("tune", SQUARE, "gone.mp4", "--agree", "0.01", *asked)
    refused = cli("tune", "gone.mp4", *asked)
    assert (done.code, refused.code) == (6, 3)
    check("tune", [done.record, refused.record])
    check("Recipes of operations", [cli("tune", SQUARE, "gone.mp4", "--operations", *asked).record], errors=False)


@pytest.mark.full
def test_profile(cli, tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("evoprune.bench.profile.matmul_rate", lambda *_, **__: 1e11)
    quick = ("-r", "1", "--size", "112x168", "-b", "0.5", "--format", "json", "--method")
    quick += (f"fastv,{write_recipe(tmp_path)}", *SHORT)
    check("profile", [cli("profile", "-m", str(tiny_folder), *quick).record], errors=False)


def test_verify(cli):
    refused = cli("verify", "gone.mp4", "-m", "demo", "--json").record
    check("verify", [cli("verify", "-m", "demo", "--quick", "--json").record, refused])


def test_inspect(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("evoprune.methods.plugins", lambda: {"own": "a package"})
    video = cli("inspect", SQUARE, "--scan", "--overlay", str(tmp_path / "a.png"), "--json", *SHORT)
    others = [cli("inspect", *args, "--json").record for args in ((), ("-m", "demo"), ("gone.mp4",))]
    check("inspect", [video.record, *others])


def test_methods(cli):
    check("methods", [cli("methods", "--json").record, cli("methods", "--json", "--what").record])
