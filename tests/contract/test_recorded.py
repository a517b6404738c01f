"""The product does what it did when `python -m tests.contract.record` was run: recorded.json, case by case.

With EVOPRUNE_CONTRACT=exact everything must be the same. Otherwise another processor may differ in the last bits: see `cases`.
"""

import difflib
import json
import math
import os

import pytest

from tests.contract.cases import CASES
from tests.contract.record import RECORDED
from tests.contract.running import materials, running, unpacked, where

EXACT = os.environ.get("EVOPRUNE_CONTRACT") == "exact"
HELD = json.loads(RECORDED.read_text(encoding="utf-8"))
MADE_WITH = HELD.pop("recorded with")


def differences(path: str, old, new) -> list[str]:
    """What differs between two values of a field, a line each, which begins with the field."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in dict.fromkeys([*old, *new]):
            here = f"{path}.{name}" if path else name
            if name not in new:
                lines.append(f"{here}: was {short(old[name])}, and is not there any more")
            elif name not in old:
                lines.append(f"{here}: is {short(new[name])}, and was not there")
            else:
                lines += differences(here, old[name], new[name])
        return lines
    if old == new or (path.startswith("exact ") and not EXACT):
        return []
    if path.startswith("units ") and isinstance(old, str) and isinstance(new, str):
        return different_units(path, unpacked(old), unpacked(new))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(f"{path}[{i}]", a, b)
        ]
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (old, new))
    if numbers and not EXACT and float in (type(old), type(new)) and math.isclose(old, new, rel_tol=1e-3, abs_tol=1e-3):
        return []
    if isinstance(old, str) and isinstance(new, str) and "\n" in old + new:
        changed = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in "+-"]
        return [f"{path}: lines that were (-) and are (+)", *(f"    {line}" for line in changed)]
    return [f"{path}: was {short(old)}, is {short(new)}"]


def different_units(path: str, old: list[int], new: list[int]) -> list[str]:
    """Kept units are compared as sets, owners unit by unit. A few may differ: at most 3%, or one."""
    if path == "units kept":
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


@pytest.mark.skipif(where() != MADE_WITH, reason=f"recorded with {MADE_WITH}")
@pytest.mark.few(50)
@pytest.mark.parametrize("name", CASES)
def test_as_recorded(folder, name):
    with running(folder):
        new = json.loads(json.dumps(CASES[name]()))
    lines = differences("", HELD.get(name, {}), new)
    if lines:
        pytest.fail(
            "\n".join([f"{name!r} differs from what was recorded:", *(f"  {line}" for line in lines)]), pytrace=False
        )


def test_a_difference_is_shown_with_its_field_and_both_values():
    old = {"answer": "green", "err": "a\nb", "n": {"x": 1}, "exact f": "1", "share": 0.5}
    new = {"answer": "blue", "err": "a\nc", "n": {"x": 1, "y": 2}, "exact f": "1", "share": 0.5002}
    lines = differences("", old, new)
    assert lines[:4] == ["answer: was 'green', is 'blue'", "err: lines that were (-) and are (+)", "    - b", "    + c"]
    assert lines[4] == "n.y: is 2, and was not there" and len(lines) == (6 if EXACT else 5)
    few = different_units("units kept", list(range(100)), [*range(99), 200])
    assert bool(few) == EXACT and different_units("units kept", list(range(10)), list(range(2, 12)))
