"""What each method keeps against what it costs, as a chart.

    python -m experiments.tradeoff results/default-scenes.md -o results/tradeoff.svg

It reads a document of `experiments.comparison`, and the first table of first tokens in a document of benchmarks. The left
panel has the operations of tower and prefill at 3B dimensions, which every row has. The right panel has the first token as it was
measured. A method that acts after the encoder was not timed: it stands at the measured bound, which leaves out its selection.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evoprune import methods
from evoprune.errors import EvopruneError, UsageError
from evoprune.evaluation.scores import FULL, METHOD
from evoprune.text import budget_text
from evoprune.visualize.chart import Panel, Point, Series, draw
from evoprune.visualize.svg import SOFT
from experiments.comparison_document import read
from experiments.comparison_tables import Budget, share

# Dark enough for labels of 11 pixels on white; the first is `evoprune`'s.
COLOURS = ("#0072B2", "#C24A00", "#00785A", "#A6457E", "#7D5F00", "#4B4B4B", "#6A4FB3", "#2F7D8C")
EARLIER = " (earlier form)"
FASTER = "times as fast as Hugging Face"


@dataclass(frozen=True)
class Row:
    """A method at a budget: percent of the full accuracy that it keeps, with its interval, and of the full operations."""

    method: str
    budget: Budget
    kept: float
    low: float
    high: float
    operations: float


def rows(document: str) -> list[Row]:
    """The rows of the first model in a document of `experiments.comparison`.

    Methods that have changed since, which the document marks with *, are called earlier forms. Variants and combinations are left
    out.

    Raises:
        UsageError: the document holds no tables of methods.
    """
    found = read(document)[0].document["rows"]
    full = next(row["tflop_3b"] for row in found if row["row"] == FULL)
    made = []
    for row in found:
        name = row["method"]
        if row["row"] == METHOD and not {":", "+"} & set(name):
            name += EARLIER * row["outdated"]
            shares = (100 * row[part] for part in ("kept_of_full", "kept_low", "kept_high"))
            made.append(Row(name, row["budget"], *shares, 100 * row["tflop_3b"] / full))
    return made


def first_tokens(document: str) -> dict[str, float]:
    """The first token of each row as percent of Hugging Face's, by the row's name, from the first table with that ratio.

    Raises:
        UsageError: there is no such table.
    """
    for table in re.findall(r"(?:^\|.*\n)+", document, re.M):
        titles, _, *lines = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines())
        if FASTER in titles:
            return {line[0]: 100 / float(line[titles.index(FASTER)]) for line in lines}
    raise UsageError("the document has no table of times", f"name one with a column {FASTER!r}")


def frontier(points: Sequence[Point]) -> tuple[Point, ...]:
    """Those points that no other beats in what it costs and in what it keeps, the cheapest first."""
    made: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not made or point.y > made[-1].y:
            made.append(point)
    return tuple(made)


def chart(found: Sequence[Row], times: Mapping[str, float]) -> str:
    """SVG: what is kept against operations, and against the first token."""
    names = sorted({row.method for row in found}, key=lambda name: (name != methods.DEFAULT, name))
    colours = dict(zip(names, COLOURS, strict=False))
    panels = (
        _panel(
            "By operations",
            "operations of tower and prefill at 3B, % of full",
            {row: row.operations for row in found},
            (Point(100.0, 100.0, label="full"),),
            colours,
        ),
        _panel(
            "By first token (other methods: at the bound)",
            "first token at 3B, measured, % of Hugging Face's",
            dict(_timed(found, times)),
            (Point(times["budget 1.0"], 100.0, label="full"), Point(100.0, 100.0, label="Hugging Face")),
            colours,
        ),
    )
    budgets = ", ".join(map(budget_text, sorted({row.budget for row in found}, key=share)))
    facts = (
        f"Each line: -b {budgets}, from left to right, with 95% intervals. Dashed: the frontier, which no row beats in both. "
        "Accuracy: a demo model on its own clips. Times: 8 moving frames, fp32, 4 CPU threads. Methods after the encoder were "
        "not timed: they stand where a selection that takes no time would put them. Methods that are not drawn may tie with these."
    )
    return draw("Accuracy kept against cost", facts, panels, legend=False)


def _timed(found: Sequence[Row], times: Mapping[str, float]) -> Iterator[tuple[Row, float]]:
    for row in found:
        name, ours = row.method.removesuffix(EARLIER), row.method == methods.DEFAULT
        after = name in methods.built_in() and methods.get(name).acts == "after"
        place = f"{methods.DEFAULT if ours else 'bound'} -b {budget_text(row.budget)}"
        if (after or ours) and place in times:
            yield row, times[place]


def _panel(
    title: str, label: str, costs: Mapping[Row, float], full: tuple[Point, ...], colours: Mapping[str, str]
) -> Panel:
    """A line a method, with the budgets of `evoprune`, the points at which nothing is pruned, and the frontier of all."""
    series = []
    for name, colour in colours.items():
        mine = sorted((row for row in costs if row.method == name), key=lambda row: share(row.budget))
        points = [
            Point(costs[row], row.kept, row.low, row.high, f"-b {budget_text(row.budget)}" * (name == methods.DEFAULT))
            for row in mine
        ]
        series += [Series(name, tuple(points), colour)] if points else []
    best = frontier([*full, *(point for one in series for point in one.points)])
    series += [*(Series("", (point,), SOFT) for point in full), Series("frontier", best, SOFT, dashed=True)]
    return Panel(title, label, "accuracy kept, % of full", tuple(series), from_zero=False)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tradeoff", description=__doc__)
    parser.add_argument("table", type=Path, help="a document of experiments.comparison")
    parser.add_argument("--times", type=Path, default=Path("results/benchmarks.md"), help="default: %(default)s")
    parser.add_argument("--method", help="some methods, by today's names, separated by commas; at most eight")
    parser.add_argument("-o", "--output", type=Path, required=True, help="an SVG file")
    asked = parser.parse_args(sys.argv[1:] if args is None else args)
    try:
        found = rows(asked.table.read_text(encoding="utf-8"))
        wanted = asked.method.split(",") if asked.method else list(dict.fromkeys(row.method for row in found))
        found = [row for row in found if {row.method, row.method.removesuffix(EARLIER)} & set(wanted)]
        if not found or len(wanted) > len(COLOURS):
            hint = ", ".join(sorted({row.method for row in rows(asked.table.read_text(encoding="utf-8"))}))
            raise UsageError(f"a chart shows one to {len(COLOURS)} methods", f"choose with --method among {hint}")
        asked.output.write_text(chart(found, first_tokens(asked.times.read_text(encoding="utf-8"))), encoding="utf-8")
    except (EvopruneError, OSError) as problem:
        hint = getattr(problem, "hint", "name files that exist")
        parser.exit(2, f"error: {getattr(problem, 'message', problem)}\nhint: {hint}\n")
    print(asked.output)


if __name__ == "__main__":
    main()
