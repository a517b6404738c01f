"""Measure the accuracy that presets keep: `python -m experiments.accuracy.frontier OUT --split heldout --seed N --limit N`.

Evaluates both worlds, each with two sets of weights. Each combination of a world and weights is called a set and has its own folder
in OUT. If the folder already contains a run, that run is resumed. For each method and budget, the table shows the percentage of
full accuracy kept, the difference from the full model in percentage points with its 95% interval, and the worst set.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evoprune.bench import EvalSettings, Evaluation
from evoprune.methods import Budget
from evoprune.session import ModelOptions
from evoprune.util import budget_text
from experiments import tables
from experiments.accuracy.paired import in_points, paired_difference
from experiments.demo.write import clips_asked, data_text, demo_videos
from experiments.progress import progress_line

SETS = {
    "scenes": ("scenes", "demo-scenes"),
    "scenes, second": ("scenes", "tests/demo/second-scenes"),
    "shapes": ("shapes", "demo"),
    "shapes, second": ("shapes", "tests/demo/second"),
}
# Values of a sample's `row` field: the unpruned model, and a method at a budget.
FULL = "full"
METHOD = "method"
GROUPS = ("picture", "video", "text", "events")  # only the world of scenes has these groups


def folder_of(out: Path, name: str) -> Path:
    """Return the folder inside `out` that stores one set's evaluation."""
    return out / name.replace(", ", "-")


def samples_of(out: Path, name: str) -> list[dict]:
    """Load the samples stored by one set's evaluation, excluding failed samples."""
    with open(folder_of(out, name) / "samples.jsonl", encoding="utf-8") as file:
        return [sample for sample in map(json.loads, file) if "error" not in sample]


def evaluated(out: Path, name: str, args: argparse.Namespace) -> list[dict]:
    """Run one set's evaluation, and return its samples."""
    world, model = SETS[name]
    settings = EvalSettings(
        data_text(world, args.split, args.seed),
        tuple(Budget.parse(text).recorded for text in args.budget.split(",")),
        tuple(args.method.split(",")),
        limit=args.limit,
        # Run on the CPU, because evoprune prunes clips this small inside the tower only on CPUs.
        model=ModelOptions(model, device="cpu", dtype="fp32"),
    )
    with demo_videos(clips_asked(world, args.split, args.seed, args.limit)) as videos:
        run = Evaluation(settings, videos)
        folder = folder_of(out, name)
        run.keep_in(folder, resume=folder.exists())
        run.load()
        run.run(lambda *what: print(f"{name}: {progress_line(*what)}", file=sys.stderr, flush=True), args.processes)
    return [sample for sample in run.samples if "error" not in sample]


def kept(mine: Sequence[dict], full: Sequence[dict]) -> float:
    """Return a row's accuracy as a percentage of the full model's accuracy."""
    return 100 * float(np.mean([s["right"] for s in mine]) / np.mean([s["right"] for s in full]))


def table(samples: dict[str, list[dict]]) -> list[str]:
    """Return a Markdown table with a row for each method and budget, and columns for each set, each group, and the worst set."""
    columns = [(name, group) for name in samples for group in (None, *(GROUPS if "scenes" in name else ()))]
    heads = [name if group is None else f"{name}: {group}" for name, group in columns]
    lines = []
    rows = dict.fromkeys((s["method"], s["budget"]) for each in samples.values() for s in each if s["row"] == METHOD)
    for method, budget in rows:
        cells = []
        whole = []
        for name, group in columns:
            found = [s for s in samples[name] if group is None or group in s["groups"]]
            full = [s for s in found if s["row"] == FULL]
            mine = [s for s in found if (s["row"], s["method"], s["budget"]) == (METHOD, method, budget)]
            cells.append(f"{kept(mine, full):.1f}" if any(s["right"] for s in full) else "")
            if group is None:
                whole.append(kept(mine, full))
                cells[-1] += f", {in_points(*paired_difference(mine, full))}"
        lines.append([f"`{method} -b {budget_text(budget)}`", f"{min(whole):.1f}", *cells])
    return tables.table(["", "worst", *heads], lines)


def against(samples: dict[str, list[dict]], others: dict[str, list[dict]]) -> list[str]:
    """Return a Markdown table of accuracy differences from the same rows in another run, on the clips that both runs share.

    The differences are in percentage points.
    """
    rows = dict.fromkeys((s["method"], s["budget"]) for each in samples.values() for s in each if s["row"] == METHOD)
    lines = []
    for method, budget in rows:
        cells = []
        for name in samples:
            mine, theirs = (
                [s for s in runs[name] if (s["row"], s["method"], s["budget"]) == (METHOD, method, budget)]
                for runs in (samples, others)
            )
            both = {(s["video"], s["id"]) for s in mine} & {(s["video"], s["id"]) for s in theirs}
            mine, theirs = ([s for s in each if (s["video"], s["id"]) in both] for each in (mine, theirs))
            cells.append(in_points(*paired_difference(mine, theirs)))
        lines.append([f"`{method} -b {budget_text(budget)}`", *cells])
    return tables.table(["", *samples], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--seed", type=int, default=0, help="block of the split's clips")
    parser.add_argument("--limit", type=int, default=100, help="clips of each set")
    parser.add_argument("-b", "--budget", default=",".join(list(Budget.PRESETS)[1:]))
    parser.add_argument("--method", default="evoprune")
    parser.add_argument("--sets", default=";".join(SETS), help="some of: %(default)s")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--against", type=Path, help="folder of the same run by another version, to compare row by row")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="folders of other runs to include")
    args = parser.parse_args(arguments)
    samples = {name: evaluated(args.out, name, args) for name in args.sets.split(";")}
    for name, each in samples.items():
        for folder in args.also:
            each += samples_of(folder, name)
    for name, each in samples.items():
        full = [s for s in each if s["row"] == FULL]
        share = 100 * np.mean([s["right"] for s in full])
        print(f"- {name}: {len(full):,} questions about {len({s['video'] for s in full}):,} clips; full {share:.1f}%")
    print("\n".join(["", *table(samples)]))
    if args.against:
        print("\n".join(["", *against(samples, {name: samples_of(args.against, name) for name in samples})]))


if __name__ == "__main__":
    main()
