"""Compare every method at the same budgets, in a document and a chart: `python -m experiments.accuracy.comparison`.

The rows are all methods; `evoprune` with its selection after the tower (`evoprune:depth=1`); and reuse in time before each method
that selects after the tower (`reuse+NAME`). So reuse and selection can be compared separately. Each row answers the same questions
about the demo's clips, once in every model given. Each model's run has a folder. The same command resumes an interrupted run.

Within a budget every row is paired with the best one. A row is a tie if the 95% interval of the difference, over videos, includes
zero. The best row is the best of many on the same answers, so its accuracy is a little too high. At equal cost every row of another
method is paired with the most expensive row of `evoprune` that costs no more. That row is found by the costs alone. Methods that
cost much are matched fairly only if `evoprune` also runs at larger budgets: `--equal-cost` gives it some that no other row has.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from evoprune import methods
from evoprune.bench.chart import COLOURS, INK, Panel, Point, Series, draw
from evoprune.bench.eval import EvalSettings, Evaluation, told
from evoprune.bench.eval_folder import SETTINGS
from evoprune.bench.questions import VideoQuestions
from evoprune.bench.scores import ALL, FULL
from evoprune.errors import EvopruneError, UsageError
from evoprune.methods.budget import Budget
from evoprune.methods.registry import REUSE
from evoprune.session.options import ModelOptions
from evoprune.util import budget_text
from experiments.accuracy.comparison_tables import OURS, Outcome, Recorded, document, share
from experiments.demo.worlds import SHAPES, WORLDS
from experiments.demo.write import clips_asked, data_text, demo_videos

BUDGETS = (0.5, 0.25, 0.1)
CLIPS = 100


def compared() -> list[str]:
    """Return the rows: methods by name, this package's own first, then `evoprune` and each selector after the tower with reuse.

    Without `operations`, for which each model must have a recipe: `--method` adds it.
    """
    names = [name for name in methods.built_in() if name not in ("none", "operations")]
    return [*names, f"{OURS}:depth=1", *(f"{REUSE}+{name}" for name in names if methods.get(name).acts == "after")]


def measure(
    settings: EvalSettings,
    videos: Sequence[VideoQuestions],
    folder: Path,
    processes: int,
    progress: Callable[[str], None],
) -> Outcome:
    """Runs a model's evaluation, or resumes it, in a folder of its own inside `folder`, `processes` clips at a time.

    Raises:
        EvopruneError: what `Evaluation` and `load_model` raise. One reason is a run in the folder with other settings.
    """
    run = Evaluation(settings, videos)
    place = folder / re.sub(r"[^A-Za-z0-9._-]+", "-", settings.model.model).strip("-")
    begun = (place / SETTINGS).exists()
    if begun:
        run.keep_in(place, resume=True)
    run.load()
    if not begun:
        run.keep_in(place)
    run.run(lambda *what: progress(f"{settings.model.model}: {told(*what)}"), processes)
    made = run.document()
    run.folder.finish(made)
    return Outcome(settings.model.model, made, run.samples)


def compare(
    models: Sequence[str],
    budgets: Sequence[Recorded],
    folder: Path,
    *,
    names: Sequence[str] | None = None,
    world: str = SHAPES.name,
    split: str = SHAPES.splits[0],
    seed: int = 0,
    limit: int = CLIPS,
    processes: int = 1,
    alone: Sequence[Recorded] = (),
    progress: Callable[[str], None] = lambda what: None,
) -> list[Outcome]:
    """Every method of `names`, by default all rows, at every budget in every model, one model after another.

    `evoprune` alone also runs at the budgets `alone`, for the pairs at equal cost.

    Raises:
        EvopruneError: what `measure` raises.
    """
    settings = EvalSettings(
        data_text(world, split, seed),
        tuple(budgets),
        tuple(names or compared()),
        blind=True,
        limit=limit,
        # On a CPU, which prunes clips as small as these inside the tower too; in the demo's own dtype, whatever the model.
        model=ModelOptions(device="cpu", dtype="fp32"),
        timed=True,
    )
    made = []
    with demo_videos(clips_asked(world, split, seed, limit)) as videos:
        for model in models:
            mine = replace(settings, model=replace(settings.model, model=model))
            outcome = measure(mine, videos, folder, processes, progress)
            if alone:
                more = replace(mine, budgets=tuple(alone), methods=(OURS,))
                outcome = outcome.with_rows_of(measure(more, videos, folder / "equal-cost", processes, progress))
            made.append(outcome)
    return made


def _print_progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what[:78]}", end="", file=sys.stderr, flush=True)


def chart(outcomes: Sequence[Outcome], budgets: Sequence[Recorded]) -> str:
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
    settings = outcomes[0].document["settings"]
    count = outcomes[0].document["videos"]["evaluated"]
    facts = f"{settings['data']}, {count:,} clips, 95% intervals over videos. "
    facts += "The most accurate method on top: mean over models and budgets."
    return draw("Accuracy of each method at the same budgets", facts, panels, rows=names)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.accuracy.comparison", description=__doc__)
    parser.add_argument("--model", action="append", help="folder, hub id or demo; may be given several times")
    parser.add_argument("--method", help="some methods instead of all, separated by commas")
    parser.add_argument("-b", "--budget", default=",".join(map(str, BUDGETS)), help="default: %(default)s")
    parser.add_argument(
        "--equal-cost", default="", metavar="BUDGETS", help=f"more budgets of {OURS}, for the pairs at equal cost alone"
    )
    parser.add_argument("--world", default=SHAPES.name, choices=WORLDS, help="default: %(default)s")
    parser.add_argument("--split", default=SHAPES.splits[0], choices=SHAPES.splits, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="block of clips (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=CLIPS, help="clips (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="clips at a time (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/comparison"), help="default: %(default)s")
    parser.add_argument("--table", type=Path, default=Path("runs/comparison.md"), help="default: %(default)s")
    parser.add_argument("--chart", type=Path, default=Path("runs/comparison.svg"), help="default: %(default)s")
    given = list(sys.argv[1:] if args is None else args)
    asked = parser.parse_args(given)
    try:
        budgets = list(dict.fromkeys(Budget.parse(text).recorded for text in asked.budget.split(",")))
        alone = [Budget.parse(text).recorded for text in asked.equal_cost.split(",") if text]
        if (
            max(map(share, budgets + alone)) == 1
            or len(budgets) > len(COLOURS)
            or min(asked.limit, asked.processes) < 1
        ):
            raise UsageError(
                "budgets are shares below 1, at most six; clips and processes one or more", "for example -b 0.5,0.1"
            )
        if set(alone) & set(budgets):
            raise UsageError("--equal-cost repeats a budget of -b", "name other budgets, for example 0.75,0.5")
        for path in (asked.table, asked.chart):
            if not path.parent.is_dir():
                raise UsageError(f"cannot write {path}", "name a file in an existing folder")
        outcomes = compare(
            list(dict.fromkeys(asked.model or ["demo"])), budgets, asked.output,
            names=asked.method and list(dict.fromkeys(asked.method.split(","))),
            world=asked.world, split=asked.split, seed=asked.seed, limit=asked.limit,
            processes=asked.processes, alone=alone, progress=_print_progress,
        )  # fmt: skip
    except EvopruneError as problem:
        parser.exit(problem.exit_code, f"error: {problem.message}\nhint: {problem.hint}\n")
    image = Path(os.path.relpath(asked.chart, asked.table.parent)).as_posix()
    command = shlex.join(["python", "-m", "experiments.accuracy.comparison", *given])
    asked.table.write_text(document(outcomes, budgets, image, command), encoding="utf-8")
    asked.chart.write_text(chart(outcomes, budgets), encoding="utf-8")
    print(f"{asked.table}, {asked.chart}")


if __name__ == "__main__":
    main()
