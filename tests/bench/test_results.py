"""Test tables that are formatted as text: their columns, and how words are wrapped."""

from itertools import pairwise

import pytest

from evoprune.bench.results import Column, as_csv, fitting, grid
from evoprune.bench.tune_operations import OperationResults

NAMES = [f"evoprune:alpha={alpha}:reuse=0 -b 0.25" for alpha in (1, 2, 3)]
COLUMNS = [
    Column("", str),
    Column("first token", lambda name: "3.21x"),
    Column("agree", lambda name: "97.1 (95.0-99.0)"),
    Column("KL", lambda name: "0.012", drop=1),
]


@pytest.mark.parametrize("width", [80, 60, 48, 40, 34])
def test_a_name_is_wrapped_and_not_cut(width):
    lines, columns = fitting(NAMES, COLUMNS, width)
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    place = (
        lines[0].index("first")
        if "first token" in lines[0]
        else min(line.find("3.21x") for line in lines if "3.21x" in line)
    )
    shown = "".join(line[:place].strip() for line in lines).replace(" ", "")
    assert shown == "".join(NAMES).replace(" ", "")
    assert sum("3.21x" in line and "97.1 (95.0-99.0)" in line for line in lines) == len(NAMES)
    assert columns == COLUMNS[: 4 if width > 60 else 3]


@pytest.mark.parametrize("width", [80, 40, 30])
def test_recipes_of_operations(width):
    rows = [
        {"budget": 0.2, "share": 0.21, "operations": 1234, "kl": 0.1234, "agree": 0.97},
        {"budget": 0.3, "share": 0.31, "operations": 1000, "kl": None, "agree": None},
    ]
    document = {
        "model": {"id": "m", "dtype": "fp32", "device": "cpu"}, "answer_tokens": 9, "questions": 1, "seconds": 1.0, "rows": rows,
        "videos": {"answered": 1, "wanted": 1}, "failures": [], "error": None, "complete": True,
    }  # fmt: skip
    lines = OperationResults(document).table(width).splitlines()
    assert max(map(len, lines[:-1])) <= width and "-b 0.2  21.0%" in " ".join(lines) and "0.123" in " ".join(lines)
    assert any(line.startswith("-b 0.3  31.0%") and "-" in line[14:] for line in lines)
    assert ("operations: number left out" in " ".join(" ".join(lines).split())) == (width >= 40)


def test_words_of_a_text_are_wrapped_and_not_cut():
    lines, _ = grid(
        ["name", "acts", "source"], [["evoprune-merge", "in the encoder", "arXiv 2603.03681,"]], 30, right=False
    )
    assert "…" not in "".join(lines) and max(map(len, lines)) <= 30
    columns = [lines[0].index(title) for title in ("name", "acts", "source")] + [30]
    whole = ["".join("".join(line[a:b] for line in lines[1:]).split()) for a, b in pairwise(columns)]
    assert whole == ["evoprune-merge", "intheencoder", "arXiv2603.03681,"]


def test_csv_never_has_formulas():
    text = as_csv([{"name": "=1+1", "difference": -0.5, "method": "-3", "note": "@x", "none": None}])
    assert text == "name,difference,method,note,none\n'=1+1,-0.5,-3,'@x,\n"
