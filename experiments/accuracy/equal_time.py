"""Compare all methods with `evoprune`: the accuracy that each keeps, its cost, and which method is better at equal speed.

    python -m experiments.accuracy.equal_time results/frontier.md --presets DIR --rivals DIR DIR -o tables.md --chart FILE.svg

The folders are written by `experiments.accuracy.frontier`. The `--presets` folder contains the presets evaluated on many clips and
is used for the chart. The `--rivals` folders contain the methods to compare, restricted to the clips that all of them have in
common.

The page contains speeds from `evoprune profile` in two types of tables: some have budgets as columns (`| | -b 0.25 |`), and others
have rows named `METHOD -b BUDGET`. If a setting was measured more than once, the slowest run is used. Methods that select after the
encoder are assigned the speed of the bound, which excludes the selection time.

To draw only the chart from existing tables:

    python -m experiments.accuracy.equal_time results/frontier.md --tables results/comparison.md --chart results/frontier.svg
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evoprune.bench import Panel, Point, Series, draw
from evoprune.methods import Budget, MethodChain
from evoprune.util import budget_text
from experiments import tables
from experiments.accuracy.frontier import FULL, METHOD, SETS, kept, samples_of
from experiments.accuracy.frontier import table as by_group
from experiments.accuracy.paired import in_points, paired_difference
from experiments.svg import COLOURS, INK, SOFT

OURS = "evoprune"
ALIKE = 1.03  # two times are considered equal if their ratio is at most this
# Row and column titles in the page with the measured speeds.
BOUND = "bound of all methods after the encoder"
FULL_ROW = "budget 1.0"
RATIO = "times as fast as Hugging Face"

Key = tuple[str, float | str]  # method and budget
Samples = dict[str, dict[Key, list[dict]]]  # set -> row -> samples; NONE is the unpruned row
NONE: Key = "none", 1.0


def read(folders: Sequence[Path]) -> Samples:
    """Load the rows from all folders, keeping only questions answered by every row in a set."""
    found: Samples = {}
    for name in SETS:
        rows: dict[Key, dict] = {}
        for folder in folders:
            for sample in samples_of(folder, name):
                if sample["row"] in (FULL, METHOD):
                    key = NONE
                    if sample["row"] == METHOD:
                        key = (sample["method"], sample["budget"])
                    rows.setdefault(key, {})[sample["video"], sample["id"]] = sample
        shared = set.intersection(*(set(each) for each in rows.values()))
        found[name] = {key: [each[which] for which in sorted(shared)] for key, each in rows.items()}
    return found


def speeds(page: str) -> dict[Key, float]:
    """Return the first-token speedups over Hugging Face listed in the page, by method and video budget.

    If the page lists a method and budget more than once, the lowest speedup is used.
    """
    found: dict[Key, float] = {}

    def add(method: str, share: str, cell: str) -> None:
        key = NONE
        if method != FULL_ROW:
            key = (method, Budget.parse(share).video)
        found[key] = min(float(cell), found.get(key, float(cell)))

    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        titles, _, *rows = ([cell.strip(" `") for cell in line.strip()[1:-1].split("|")] for line in block.splitlines())
        for name, *cells in rows:
            method, _, budget = name.partition(" -b ")
            if all(title.startswith("-b ") for title in titles[1:]):
                for title, cell in zip(titles[1:], cells, strict=True):
                    add(name, title.removeprefix("-b "), cell)
            elif budget and RATIO in titles:
                add(method, budget, cells[titles.index(RATIO) - 1])
    return found


def speed_of(key: Key, fast: dict[Key, float]) -> float | None:
    """Return the speedup of a method at a budget, or None if it was not measured.

    Methods that select after the encoder are assigned the speedup of the bound.
    """
    name, budget = key
    if MethodChain.parse(name).acts == "after":
        name = BOUND
    return fast.get((name, Budget.parse(budget).video))


def worst(samples: Samples, key: Key) -> float:
    """Return the percentage of full accuracy that a method keeps at a budget in its worst set."""
    return min(kept(rows[key], rows[NONE]) for rows in samples.values())


def rows_of(samples: Samples) -> set[Key]:
    """Return the methods and budgets evaluated in every set."""
    return set.intersection(*(set(rows) for rows in samples.values()))


def summary_table(samples: Samples, world: str, fast: dict[Key, float]) -> list[str]:
    """Return a table of one world's methods: the accuracy kept in each set, the share of operations, and the speed."""
    sets = [rows for name, rows in samples.items() if name.split(",")[0] == world]
    budgets = [
        budget for budget in Budget.PRESETS if any(key[0] != OURS and key[1] == budget for key in rows_of(samples))
    ]
    heads = [head for budget in budgets for head in (f"`-b {budget}` keeps", "operations", "first token")]

    def shares(key: Key) -> list[float]:
        return [kept(rows[key], rows[NONE]) for rows in sets]

    def cells(key: Key) -> list[str]:
        spent = np.mean([s["tflop_3b"] for s in sets[0][key]]) / np.mean([s["tflop_3b"] for s in sets[0][NONE]])
        found = [" / ".join(f"{each:.1f}" for each in shares(key)), f"{100 * spent:.0f}%", ""]
        if speed := speed_of(key, fast):
            found[-1] = f"{speed:.2f}"
        return found

    names = dict.fromkeys(name for name, budget in sorted(rows_of(samples), key=str) if budget in budgets)
    ordered = sorted(names, key=lambda name: -np.mean([shares((name, budget)) for budget in budgets]))
    rows = [[f"`{name}`", *(c for budget in budgets for c in cells((name, budget)))] for name in ordered]
    return tables.table(["", *heads], rows)


def verdicts(samples: Samples, key: Key, ours: Key) -> list[str]:
    """Return a verdict for each set: whether the row `ours` beats the row `key`, and by how many percentage points."""
    made = []
    for rows in samples.values():
        mean, low, high = paired_difference(rows[ours], rows[key])
        word = "tie"
        if low > 0:
            word = "better"
        elif high < 0:
            word = "worse"
        made.append(f"{word} {in_points(mean, low, high)}")
    return made


def table(samples: Samples, fast: dict[Key, float]) -> list[str]:
    """Return a table that compares every other method with the most accurate `evoprune` setting of at least the same speed."""
    rows = rows_of(samples)
    ours = {key: speed_of(key, fast) for key in rows if key[0] == OURS} | {NONE: fast[NONE]}
    ours = {key: speed for key, speed in ours.items() if speed}
    lines = []
    missing = []
    others = {key: speed_of(key, fast) for key in rows if key[0] not in (OURS, "none")}
    for key, speed in sorted(others.items(), key=lambda each: -(each[1] or 0)):
        text = f"`{key[0]} -b {budget_text(key[1])}`"
        if not speed:
            missing.append(text)
            continue
        slow = {one: at for one, at in ours.items() if at * ALIKE >= speed}
        if not slow:
            lines.append([text, f"{speed:.2f}", f"{worst(samples, key):.1f}", "none so fast", *[""] * (len(SETS) + 1)])
            continue
        best = max(slow, key=lambda one: worst(samples, one))
        cells = [
            text,
            f"{speed:.2f}",
            f"{worst(samples, key):.1f}",
            f"`-b {budget_text(best[1])}`",
            f"{ours[best]:.2f}",
        ]
        lines.append([*cells, *verdicts(samples, key, best)])
    made = tables.table(["", "first token", "keeps", "ours", "first token", *SETS], lines)
    if missing:
        made += ["", f"Not profiled: {', '.join(missing)}."]
    return made


def worst_of(samples: Samples) -> dict[Key, float]:
    """Return the percentage of full accuracy kept in the worst set, for each method and budget."""
    return {key: worst(samples, key) for key in rows_of(samples)}


def worst_in_tables(page: str, compared: str) -> tuple[dict[Key, float], dict[Key, float]]:
    """Read the accuracy kept from existing tables: for presets from `page`, and for other methods from `compared`.

    Returns:
        Two dicts with the percentage kept in the worst set, one for presets and one for other methods.
    """
    presets = re.findall(r"^\| `-b (\w+)` \| ([\d.]+) \| [^|]*\(", page, re.M)
    others = re.findall(r"^\| `([\w-]+) -b (\w+)` \| [\d.]+ \| ([\d.]+) \|", compared, re.M)
    ours = {
        (OURS, preset): float(kept) for preset, kept in reversed(presets)
    }  # reversed, so that the first of several tables takes precedence
    return ours, {(name, budget): float(kept) for name, budget, kept in others}


def chart(presets: dict[Key, float], others: dict[Key, float], fast: dict[Key, float]) -> str:
    """Return an SVG chart that plots the accuracy kept against the speed of the first token.

    Args:
        presets: The accuracy that each preset keeps in its worst set, in percent.
        others: The accuracy that each other method keeps in its worst set, in percent.
        fast: The result of `speeds`.
    """
    inside = []
    after = []
    for key, kept_there in sorted(others.items(), key=str):
        speed = speed_of(key, fast)
        if key[0] in (OURS, "none") or not speed:
            continue
        if MethodChain.parse(key[0]).acts == "after":
            after.append(Point(speed, kept_there))
        else:
            inside.append(Point(speed, kept_there, label=key[0]))
    ours = [(OURS, name) for name in Budget.PRESETS if (OURS, name) in presets and speed_of((OURS, name), fast)]
    line = [Point(speed_of(key, fast), presets[key], label=f"-b {key[1]}") for key in ours]
    series = [
        Series("evoprune", (Point(fast[NONE], 100.0, label="-b full"), *line), COLOURS[0]),
        *(Series("on the input, inside the encoder or the language model", (point,), COLOURS[1]) for point in inside),
        *(Series("after the encoder, if selecting costs nothing", (point,), SOFT, hollow=True) for point in after),
        Series("", (Point(1.0, 100.0, label="Hugging Face"),), INK),
    ]
    x_label = "first token, times as fast as Hugging Face"
    y_label = "accuracy kept, worst of four sets, %"
    facts = (
        "Two generated worlds, two demo models each. Other methods have the tokens of balanced and of fast. "
        "3B dimensions, 8 moving frames, fp32, two CPU threads."
    )
    return draw("Accuracy kept against speed", facts, [Panel("", x_label, y_label, tuple(series), from_zero=False)])


def page(samples: Samples, fast: dict[Key, float]) -> str:
    """Return the Markdown tables: for each world, at equal time, and by question type."""
    blocks = []
    for world in dict.fromkeys(name.split(",")[0] for name in SETS):
        about = len({s["video"] for s in samples[world][NONE]})
        blocks += [
            f"## `{world}`: {about} clips, {len(samples[world][NONE])} questions",
            "\n".join(summary_table(samples, world, fast)),
        ]
    flat = {name: [sample for each in rows.values() for sample in each] for name, rows in samples.items()}
    blocks += ["## At equal time", "\n".join(table(samples, fast)), "## By kind of question", "\n".join(by_group(flat))]
    return "\n\n".join(blocks) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=Path, help="a page with tables of times")
    parser.add_argument("--presets", type=Path, nargs="+")
    parser.add_argument("--rivals", type=Path, nargs="+")
    parser.add_argument(
        "--tables", type=Path, help="an existing page with tables, to draw the chart without --presets and --rivals"
    )
    parser.add_argument("-o", "--output", type=Path, help="file for the tables; default: stdout")
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args(arguments)
    times = args.times.read_text(encoding="utf-8")
    fast = speeds(times)
    if args.tables:
        if not args.chart or args.presets or args.rivals:
            parser.error("--tables goes only with --chart")
        ours, others = worst_in_tables(times, args.tables.read_text(encoding="utf-8"))
        args.chart.write_text(chart(ours, others, fast), encoding="utf-8")
        return
    if not args.presets or not args.rivals:
        parser.error("--presets and --rivals are needed, or --tables")
    samples = read(args.rivals)
    if args.output:
        args.output.write_text(page(samples, fast), encoding="utf-8")
    else:
        print(page(samples, fast), end="")
    if args.chart:
        drawn = chart(worst_of(read(args.presets)), worst_of(samples), fast)
        args.chart.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
