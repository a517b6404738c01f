"""Every method at the same budgets on the same clips, as a document and a chart: `python -m evoprune.comparison`.

The rows are all methods, and `evoprune` with each method after the encoder as its choice (`evoprune:choice=NAME`), so that what
is saved inside the encoder and what is read of it can be compared apart. Each row answers the same questions about the demo's
clips, once in every model given; each model's run has a folder, and the same command goes on where one was cut short.

Within a budget every row is paired with the best one: where the 95% interval of the difference, over videos, includes zero, the
row is called a tie with it. The best is found by the same answers, and many rows are compared: both make it look a little better
than it is.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evoprune import methods
from evoprune.chart import COLOURS, INK, Panel, Point, Series, draw_rows
from evoprune.choices import SPLITS
from evoprune.errors import EvopruneError, UsageError
from evoprune.evaluation import DEMO, Evaluation, Settings
from evoprune.pruning.budget import parse_budget
from evoprune.run_folder import SETTINGS
from evoprune.scores import ALL, FULL, METHOD, TYPE, paired_difference

BUDGETS, CLIPS = (0.5, 0.25, 0.1), 100
LEGEND = (
    "Accuracy in percent, with its 95% interval over videos, over all questions and by what a question is about. Against the "
    "best: the paired difference to the most accurate row of the budget; a tie where its interval includes zero. Tokens: what the "
    "language model reads, mean of a question; where a method's shape forbids the budget, what it reached. Live share: rows that "
    "the tower computes, mean over its layers. TFLOP: 10^12 operations of tower and prefill at 3B dimensions, from the true rows "
    "of each layer. Selection: milliseconds of scores, merging and choice in the run that made this, for a video, or for each "
    "question where the choice depends on it."
)


@dataclass(frozen=True)
class Standing:
    """How a row stands to the best of its budget: its accuracy less the best's, with the 95% interval of that, as shares."""

    difference: float
    low: float
    high: float
    best: bool

    @property
    def tie(self) -> bool:
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        if self.best:
            return "best"
        told = f"{100 * self.difference:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        return f"tie {told}" if self.tie else told


@dataclass(frozen=True)
class Outcome:
    """One model's answers: its name, the results as `Evaluation.document` has them, and the samples behind them."""

    name: str
    document: dict
    samples: list[dict]

    def rows(self, budget: float) -> list[dict]:
        """The rows of a budget over all questions, the most accurate first."""
        found = [row for row in self.document["rows"] if _at(row, budget) and row["group"] == ALL]
        return sorted(found, key=lambda row: -row["accuracy"])


def compared() -> list[str]:
    """What is compared: methods by name, this package's own first, then `evoprune` with each choice there is."""
    names = [name for name in methods.available() if name != "none"]
    return [*names, *(f"evoprune:choice={name}" for name in names if methods.get(name).acts == "after")]


def standings(samples: Sequence[dict], budget: float) -> dict[str, Standing]:
    """Of each method at a budget, by name. The best has most right answers; of several, it is the first."""
    rows: dict[str, list[dict]] = {}
    for sample in sorted((s for s in samples if "error" not in s), key=lambda s: s["video"]):  # stable
        if _at(sample, budget):
            rows.setdefault(sample["method"], []).append(sample)
    if not rows:
        return {}
    right = {name: sum(s["right"] for s in found) for name, found in rows.items()}
    first = max(rows, key=right.__getitem__)
    return {name: Standing(*paired_difference(found, rows[first]), name == first) for name, found in rows.items()}


def document(outcomes: Sequence[Outcome], budgets: Sequence[float], chart: str, command: str) -> str:
    """All of it in Markdown."""
    settings = outcomes[0].document["settings"]
    parts = [
        "# The methods side by side",
        f"`{command}`",
        f"Clips of the demo's generator ({settings['split']}, block {settings['seed']}), small and synthetic: how methods rank on "
        "them, not what a real Qwen2.5-VL scores.",
        f"![Accuracy of each method]({chart})",
    ]
    if len(outcomes) > 1:
        parts += ["## Best, or a tie with the best, in all models", _shared(outcomes, budgets)]
    for outcome in outcomes:
        videos, items = outcome.document["videos"], outcome.document["items"]
        failed = f"; {videos['failed']} failed and are left out" if videos["failed"] else ""
        full = next((row for row in outcome.document["rows"] if row["row"] == FULL and row["group"] == ALL), None)
        parts += [
            f"## {outcome.name}",
            f"{items['answered']:,} questions about {videos['shown']:,} of {videos['wanted']:,} clips{failed}. In full: "
            + (f"{_accuracy(full)}, {full['tokens']:,.0f} tokens, {full['tflop_3b']:.3g} TFLOP." if full else "-"),
        ]
        for budget in budgets:
            parts += [f"### `-b {budget:g}`", _table(outcome, budget)]
    parts.append(LEGEND)
    return "\n\n".join(parts) + "\n"


def _table(outcome: Outcome, budget: float) -> str:
    groups = list(dict.fromkeys(row["group"] for row in outcome.document["rows"]))
    groups = [group for group in groups if group != ALL and not group.startswith(TYPE)]
    found = {(row["method"], row["group"]): row for row in outcome.document["rows"] if _at(row, budget)}
    stands = standings(outcome.samples, budget)
    titles = ["", "accuracy", "against the best", *groups, "tokens", "live share", "TFLOP", "selection ms"]
    lines = [titles, ["---"] * len(titles)]
    for row in outcome.rows(budget):
        name = row["method"]
        lines.append(
            [
                f"`{name}`", _accuracy(row), str(stands[name]), *(_accuracy(found[name, group]) for group in groups),
                f"{row['tokens']:,.1f}", f"{row['live_share']:.2f}", f"{row['tflop_3b']:.3g}",
                f"{_selection_ms(outcome.samples, name, budget):.2f}",
            ]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shared(outcomes: Sequence[Outcome], budgets: Sequence[float]) -> str:
    lines = []
    for budget in budgets:
        tied = [{name for name, s in standings(o.samples, budget).items() if s.best or s.tie} for o in outcomes]
        names = [row["method"] for row in outcomes[0].rows(budget) if all(row["method"] in found for found in tied)]
        lines.append(f"- `-b {budget:g}`: {', '.join(f'`{name}`' for name in names) or 'none'}")
    return "\n".join(lines)


def chart(outcomes: Sequence[Outcome], budgets: Sequence[float]) -> str:
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
            series.append(Series(f"-b {budget:g}", tuple(points), colour))
        for row in outcome.document["rows"]:
            if row["row"] == FULL and row["group"] == ALL:
                full = 100 * row["accuracy"]
                series.append(Series("full", (Point(full, -0.5), Point(full, len(names) - 0.5)), INK, dashed=True))
        panels.append(Panel(outcome.name, "accuracy, %", "", tuple(series)))
    settings, shown = outcomes[0].document["settings"], outcomes[0].document["videos"]["shown"]
    facts = f"demo ({settings['split']}, block {settings['seed']}), {shown:,} clips, 95% intervals over videos"
    return draw_rows("Accuracy of each method at the same budgets", facts, names, panels)


def _at(row: dict, budget: float) -> bool:
    return row["row"] == METHOD and row["budget"] == budget


def _selection_ms(samples: Sequence[dict], method: str, budget: float) -> float:
    mine = [s["prune_ms"] for s in samples if "error" not in s and _at(s, budget) and s["method"] == method]
    return sum(mine) / len(mine)


def _accuracy(row: dict) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"


def measure(settings: Settings, folder: Path, processes: int, tell: Callable[[str], None]) -> Outcome:
    """Runs a model's part, or the rest of it, in a folder of its own below `folder`, so many clips at a time.

    Raises:
        EvopruneError: what `Evaluation` and `load_model` raise; among others, if it was begun with other settings.
    """
    run = Evaluation(settings, None)
    place = folder / re.sub(r"[^A-Za-z0-9._-]+", "-", settings.model).strip("-")
    begun = (place / SETTINGS).exists()
    if begun:
        run.keep_in(place, resume=True)
    run.load()
    if not begun:
        run.keep_in(place)
    run.run(lambda what: tell(f"{settings.model}: {what}"), processes)
    made = run.document()
    run.folder.finish(made)
    return Outcome(settings.model, made, run.samples)


def compare(
    models: Sequence[str],
    budgets: Sequence[float],
    folder: Path,
    *,
    split: str = SPLITS[0],
    seed: int = 0,
    limit: int = CLIPS,
    processes: int = 1,
    tell: Callable[[str], None] = lambda what: None,
) -> list[Outcome]:
    """Everything at every budget in every model, one after another; raises as `measure`."""
    settings = Settings(DEMO, tuple(budgets), tuple(compared()), split=split, seed=seed, limit=limit, timed=True)
    return [measure(replace(settings, model=model), folder, processes, tell) for model in models]


def _tell(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what[:78]}", end="", file=sys.stderr, flush=True)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evoprune.comparison", description=__doc__)
    parser.add_argument("--model", action="append", help="folder, hub id or demo; may be given several times")
    parser.add_argument("-b", "--budget", default=",".join(map(str, BUDGETS)), help="default: %(default)s")
    parser.add_argument("--split", default=SPLITS[0], choices=SPLITS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="block of clips (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=CLIPS, help="clips (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="clips at a time (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/comparison"), help="default: %(default)s")
    parser.add_argument("--table", type=Path, default=Path("docs/comparison.md"), help="default: %(default)s")
    parser.add_argument("--chart", type=Path, default=Path("docs/comparison.svg"), help="default: %(default)s")
    given = list(sys.argv[1:] if args is None else args)
    asked = parser.parse_args(given)
    try:
        budgets = list(dict.fromkeys(parse_budget(text) for text in asked.budget.split(",")))
        if max(budgets) == 1 or len(budgets) > len(COLOURS) or min(asked.limit, asked.processes) < 1:
            raise UsageError(
                "budgets are shares below 1, at most six; clips and processes one or more", "for example -b 0.5,0.1"
            )
        for path in (asked.table, asked.chart):
            if not path.parent.is_dir():
                raise UsageError(f"cannot write {path}", "name a file in a folder that is there")
        outcomes = compare(
            list(dict.fromkeys(asked.model or [DEMO])), budgets, asked.output,
            split=asked.split, seed=asked.seed, limit=asked.limit, processes=asked.processes, tell=_tell,
        )  # fmt: skip
    except EvopruneError as problem:
        parser.exit(problem.exit_code, f"error: {problem.message}\nhint: {problem.hint}\n")
    image = Path(os.path.relpath(asked.chart, asked.table.parent)).as_posix()
    command = shlex.join(["python", "-m", "evoprune.comparison", *given])
    asked.table.write_text(document(outcomes, budgets, image, command), encoding="utf-8")
    asked.chart.write_text(chart(outcomes, budgets), encoding="utf-8")
    print(f"{asked.table}, {asked.chart}")


if __name__ == "__main__":
    main()
