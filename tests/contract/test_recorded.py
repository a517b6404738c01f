"""Compare current results, case by case, with those that `python -m tests.contract.record` wrote to recorded.json.

With EVOPRUNE_CONTRACT=exact, everything must be identical. Otherwise, results may differ in the last bits (see `cases`).
"""

import difflib
import json
import math
import os

import pytest

from tests.contract.cases import CASES, NAMED
from tests.contract.record import RECORDED
from tests.contract.running import materials, running, unpacked, where

EXACT = os.environ.get("EVOPRUNE_CONTRACT") == "exact"
HELD = json.loads(RECORDED.read_text(encoding="utf-8"))
MADE_WITH = HELD.pop("recorded with")


def differences(path: str, old, new, field: str = "") -> list[str]:
    """Return a line for each difference between two values, starting with its path. `field`: the innermost field name."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in dict.fromkeys([*old, *new]):
            here = f"{path}.{name}" if path else name
            if name not in new:
                lines.append(f"{here}: was {short(old[name])}, and is not there any more")
            elif name not in old:
                lines.append(f"{here}: is {short(new[name])}, and was not there")
            else:
                lines += differences(here, old[name], new[name], name)
        return lines
    if old == new or (field.startswith("exact ") and not EXACT):
        return []
    if field.startswith("units ") and type(old) is type(new) and isinstance(old, str | list):
        return different_units(path, field, *(unpacked(each) if isinstance(each, str) else each for each in (old, new)))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(f"{path}[{i}]", a, b, field)]
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (old, new))
    if numbers and not EXACT and float in (type(old), type(new)) and math.isclose(old, new, rel_tol=1e-3, abs_tol=1e-3):
        return []
    if isinstance(old, str) and isinstance(new, str) and "\n" in old + new:
        changed = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in "+-"]
        return [f"{path}: lines that were (-) and are (+)", *(f"    {line}" for line in changed)]
    return [f"{path}: was {short(old)}, is {short(new)}"]


def different_units(path: str, field: str, old: list[int], new: list[int]) -> list[str]:
    """Compare kept units as sets, and owners unit by unit. At most 3%, or one, may differ."""
    if field == "units kept":
        gone, come = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    else:
        changed = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
        gone, come = ([f"{i}: {side[i]}" for i in changed] for side in (old, new))
    allowed = 0 if EXACT else max(1, len(old) * 3 // 100)
    if len(old) == len(new) and max(len(gone), len(come)) <= allowed and not (EXACT and old != new):
        return []
    return [f"{path}: {len(old)} were, {len(new)} are; {len(come)} differ: was {short(gone)}, is {short(come)}"]


def short(value) -> str:
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:400]}... ({len(text)} characters)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return materials(tmp_path_factory.mktemp("contract"))


def test_every_case_is_recorded():
    assert list(HELD) == list(CASES), "run python -m tests.contract.record"


def some(kind: str):
    """Decorate a test of the cases of a kind."""

    def decorate(test):
        marked = pytest.mark.skipif(where() != MADE_WITH, reason=f"recorded with {MADE_WITH}")(test)
        return pytest.mark.parametrize("name", NAMED[kind])(marked)

    return decorate


def same(folder, name: str) -> None:
    with running(folder):
        new = json.loads(json.dumps(CASES[name]()))
    lines = differences("", HELD.get(name, {}), new)
    if lines:
        pytest.fail(
            "\n".join([f"{name!r} differs from what was recorded:", *(f"  {line}" for line in lines)]), pytrace=False
        )


@pytest.mark.few(15)
@some("public")
def test_as_recorded(folder, name):
    same(folder, name)


@pytest.mark.few(4)
@some("each method")
def test_every_method(folder, name):
    same(folder, name)


@pytest.mark.few(3)
@some("held models")
def test_held_models(folder, name):
    same(folder, name)


@pytest.mark.few(2)
@some("live")
def test_streams(folder, name):
    same(folder, name)


@pytest.mark.few(6)
@some("served")
def test_what_vllm_reads(folder, name):
    same(folder, name)


@pytest.mark.full
@some("devices")
def test_other_devices(folder, name):
    if "Triton" in name:
        pytest.importorskip("triton")
    same(folder, name)


def test_a_difference_is_shown_with_its_field_and_both_values():
    old = {"answer": "green", "err": "a\nb", "n": {"x": 1}, "exact f": "1", "share": 0.5}
    new = {"answer": "blue", "err": "a\nc", "n": {"x": 1, "y": 2}, "exact f": "1", "share": 0.5002}
    lines = differences("", old, new)
    assert lines[:4] == ["answer: was 'green', is 'blue'", "err: lines that were (-) and are (+)", "    - b", "    + c"]
    assert lines[4] == "n.y: is 2, and was not there" and len(lines) == (6 if EXACT else 5)
    few = different_units("a", "units kept", list(range(100)), [*range(99), 200])
    assert bool(few) == EXACT and different_units("a", "units kept", list(range(10)), list(range(2, 12)))
    inner = [{"still 0.25": {"units kept": [1, 2, 3], "exact bits": ["1"]}} for _ in range(2)]
    inner[1]["still 0.25"] = {"units kept": [1, 2, 4], "exact bits": ["2"]}
    assert len(differences("", *inner)) == (2 if EXACT else 0)
    inner[1]["still 0.25"]["units kept"] = [5, 2, 4]
    assert differences("", *inner)[0].startswith("still 0.25.units kept: 3 were, 3 are; 2 differ: was [1, 3]")
