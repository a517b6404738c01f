"""The results of `experiments.comparison` as a chart."""

from collections.abc import Sequence

from evoprune.bench.chart import COLOURS, INK, Panel, Point, Series, draw
from evoprune.bench.scores import ALL, FULL
from evoprune.text import budget_text
from experiments.comparison_tables import Budget, Outcome


def chart(outcomes: Sequence[Outcome], budgets: Sequence[Budget]) -> str:
    """SVG: a line a method, the most accurate on top (mean over models and budgets), a dot a budget, a panel a model."""
    accuracy: dict[str, list[float]] = {}
    for outcome in outcomes:
        for budget in budgets:
            for row in outcome.rows(budget):
                accuracy.setdefault(row["method"], []).append(row["accuracy"])
    names = sorted(accuracy, key=lambda name: -sum(accuracy[name]) / len(accuracy[name]))
    panels = []
    for outcome in outcomes:
        series = []
        for budget, colour in zip(budgets, COLOURS, strict=False):
            points = (
                Point(100 * row["accuracy"], names.index(row["method"]), 100 * row["low"], 100 * row["high"])
                for row in outcome.rows(budget)
            )
            series.append(Series(f"-b {budget_text(budget)}", tuple(points), colour))
        for row in outcome.document["rows"]:
            if row["row"] == FULL and row["group"] == ALL:
                full = 100 * row["accuracy"]
                series.append(Series("full", (Point(full, -0.5), Point(full, len(names) - 0.5)), INK, dashed=True))
        panels.append(Panel(outcome.name, "accuracy, %", "", tuple(series), from_zero=False))
    settings, count = outcomes[0].document["settings"], outcomes[0].document["videos"]["evaluated"]
    facts = f"{settings['data']}, {count:,} clips, 95% intervals over videos. "
    facts += "The most accurate method on top: mean over models and budgets."
    return draw("Accuracy of each method at the same budgets", facts, panels, rows=names)
