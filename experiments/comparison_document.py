"""Reads a document of `experiments.comparison`, and draws its chart again where the runs themselves are gone.

python -m experiments.comparison_document results/comparison.md -o results/comparison.svg
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from evoprune.errors import EvopruneError, UsageError
from evoprune.evaluation.scores import ALL, FULL, METHOD
from evoprune.pruning.budget import parse_budget, plain
from experiments.comparison_chart import chart
from experiments.comparison_tables import Budget, Outcome, share

INTERVAL = re.compile(r"([\d.]+) \(([\d.]+)-([\d.]+)\)")


def read(document: str) -> list[Outcome]:
    """The models of a document, each with its rows over all questions; shares are rounded as they are printed.

    A row that the page marks with * has the field `outdated`.

    Raises:
        UsageError: the document holds no such tables.
    """
    clips = re.search(r"clips(?: of \w+)? \((\w+), block (\d+)\)", document)
    made = []
    for name, block in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", document, re.M | re.S) if clips else ():
        if facts := re.search(r"about ([\d,]+) of .*?With nothing pruned: (\S+ \(\S+\)), .*? ([\d.]+) TFLOP\.", block):
            full = {"row": FULL, "group": ALL, "method": "none", "budget": 1.0, "tflop_3b": float(facts[3])}
            rows = [full | _shares("accuracy", "low", "high", cell=facts[2]), *_rows(block)]
            settings = {"split": clips[1], "seed": int(clips[2])}
            videos = {"evaluated": int(facts[1].replace(",", ""))}
            made.append(Outcome(name, {"rows": rows, "settings": settings, "videos": videos}, []))
    if not made:
        raise UsageError("the document has no tables of methods", "name one that experiments.comparison wrote")
    return made


def budgets(outcomes: Sequence[Outcome]) -> list[Budget]:
    """The budgets of pruned rows, the largest first."""
    found = {row["budget"] for outcome in outcomes for row in outcome.document["rows"] if row["row"] == METHOD}
    return sorted(found, key=share, reverse=True)


def _rows(block: str) -> list[dict]:
    """The rows of a model's tables, one table a budget."""
    made = []
    for budget, table in re.findall(r"^### `-b ([\w.]+)`\n\n(.*?)(?:\n\n|\Z)", block, re.M | re.S):
        titles, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        for cells in lines:
            found = dict(zip(titles, cells, strict=True))
            made.append(
                {"row": METHOD, "group": ALL, "method": cells[0].strip("`*"), "budget": plain(parse_budget(budget))}
                | {"outdated": cells[0].endswith("*")}
                | {"tflop_3b": float(found["TFLOP"])}
                | _shares("accuracy", "low", "high", cell=found["accuracy"])
                | _shares("kept_of_full", "kept_low", "kept_high", cell=found["kept"])
            )
    return made


def _shares(*names: str, cell: str) -> dict[str, float]:
    """A cell like `94.2 (93.4-95.0)` as shares by name."""
    return {name: float(figure) / 100 for name, figure in zip(names, INTERVAL.fullmatch(cell).groups(), strict=True)}


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.comparison_document", description=__doc__)
    parser.add_argument("document", type=Path, help="of experiments.comparison")
    parser.add_argument("-o", "--output", type=Path, required=True, help="an SVG file")
    asked = parser.parse_args(args)
    try:
        outcomes = read(asked.document.read_text(encoding="utf-8"))
    except EvopruneError as problem:
        parser.exit(problem.exit_code, f"error: {problem.message}\nhint: {problem.hint}\n")
    asked.output.write_text(chart(outcomes, budgets(outcomes)), encoding="utf-8")
    print(asked.output)


if __name__ == "__main__":
    main()
