"""Measure what each part of a method is worth: `python -m experiments.accuracy.ablations OUT`.

All variants run in one evaluation, whose folder is OUT. An existing run is resumed. Each ablation has a table: accuracy at each
budget, and the paired difference to the first row, which is the method with its defaults. Variants are compared on the split
"validation"; a winner is reported once on seeds that were never used (`--split heldout --seed N`).
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evoprune.bench.eval import EvalSettings, Evaluation, told
from evoprune.bench.scores import FULL
from evoprune.methods.budget import Budget
from evoprune.methods.evoprune import EvoPruneMethod
from evoprune.methods.plans import ALLOCATIONS
from evoprune.methods.registry import REUSE
from evoprune.session.options import ModelOptions
from evoprune.util import budget_text
from experiments.accuracy.paired import in_points, paired_difference
from experiments.demo.worlds import SHAPES, WORLDS
from experiments.demo.write import clips_asked, data_text, demo_videos


@dataclass(frozen=True)
class Ablation:
    """Variants of a method that answer one question.

    Attributes:
        title: of the table.
        method: a name that `methods.get` takes, with or without settings.
        variants: by label, the settings of each variant beyond those of `method` ("depth=1:floor=0.5"), or the name of another
            method to compare with ("reuse+divprune").
    """

    title: str
    method: str
    variants: dict[str, str]

    def specs(self) -> dict[str, str]:
        """Variants by label, as names that `methods.get` takes. Where a setting has two values, `methods.get` uses the last."""
        return {label: _spec(self.method, variant) for label, variant in self.variants.items()}


def _spec(method: str, variant: str) -> str:
    if "=" in variant.partition(":")[0]:
        return f"{method}:{variant}"
    return variant or method


def _tried(setting: str, *values: float) -> dict[str, str]:
    """Variants in which one setting has another value."""
    return {f"{setting} {value:g}": f"{setting}={value:g}" for value in values}


PAPER = "evoprune-paper"
OURS = "evoprune"
OWN = EvoPruneMethod()
NO_ATTENTION = "attention=0:critical=0"
ABLATIONS = {
    "allocation": Ablation(
        "Allocation over layers", PAPER, {name: "" if name == "skip" else f"allocation={name}" for name in ("skip", *ALLOCATIONS)}
    ),
    "range": Ablation(
        "Range of layers, in relative depth",
        PAPER,
        {"0.2-0.5": ""}
        | {f"{a}-{b}": f"first={a}:last={b}" for a, b in ((0, 0.3), (0, 0.5), (0.2, 0.8), (0.5, 0.8), (0.5, 1), (0, 1))},
    ),
    "diversity": Ablation(
        "Weight and sign of the diversity term",
        PAPER,
        {"0.1": ""} | {str(w): f"diversity={w}" for w in (0, 0.3, 1.0, -0.1, -0.3)},
    ),
    "neighbours": Ablation(
        "Neighbours of the density, at weight 0.3",
        PAPER,
        {str(n): f"diversity=0.3:neighbours={n}" for n in (4, 1, 16)},
    ),
    "attention": Ablation(
        "Weight of attention", PAPER, {"0.1": ""} | {str(w): f"attention={w}" for w in (0, 0.3, 1.0)}
    ),
    "critical": Ablation(
        "Critical share", PAPER, {"0.1": ""} | {str(share): f"critical={share}" for share in (0, 0.05, 0.2, 0.4)}
    ),
    "paper": Ablation(
        "The paper's ablations: without diversity, without attention, without both",
        PAPER,
        {
            "all": "",
            "no diversity": "diversity=0",
            "no attention": NO_ATTENTION,
            "similarity alone": f"diversity=0:{NO_ATTENTION}",
        },
    ),
    "features": Ablation(
        "What similarity is measured on",
        PAPER,
        {"keys": "", "keys after rotary": "features=keys_rotary", "hidden states": "features=hidden"},
    ),
    "size": Ablation("How merged rows count in attention", PAPER, {"by size": "", "once": "size_bias=false"}),
    "together": Ablation(
        "The settings that won, together",
        PAPER,
        {
            "`evoprune-paper` as it is": "",
            "no attention": NO_ATTENTION,
            "decreasing": "allocation=decreasing",
            "both (`evoprune-merge`)": "evoprune-merge",
        },
    ),
    "depth": Ablation(
        "After which share of the layers rows are selected a second time",
        OURS,
        {"0.125": ""}
        | {str(share): f"depth={share}" for share in (0.1875, 0.25, 0.375, 0.5, 0.75)}
        | {"1, after the tower": "depth=1"},
    ),
    "spending": Ablation(
        "Share of an even spread that each frame pair gets at least",
        OURS,
        {"0": ""} | {str(share): f"floor={share}" for share in (0.5, 1)},
    ),
    "references": Ablation(
        "Reuse in time: levels of 255 that count as change",
        OURS,
        {"8": ""} | {str(level): f"reuse={level}" for level in (0, 3, 5, 12, 16)},
    ),
    "cluster": Ablation(
        "What a selected row becomes, and how often it counts in the language model's attention",
        OURS,
        {
            "mean of its cluster, size ** 0.5": "",
            "itself, once": "average=false:count=0",
            "mean, once": "count=0",
            "itself, size ** 0.5": "average=false",
            **{f"mean, size ** {power}": f"count={power}" for power in (0.25, 0.75, 1)},
        },
    ),
    "rows": Ablation(
        "Rows that go on after the second selection, as a power of the budget; after which share of the layers; what tokens become",
        OURS,
        {
            f"{OWN.rows:g}": "",
            **_tried("rows", *(power for power in (1, 0.875, 0.75, 0.65, 0.5) if power != OWN.rows)),
            **{f"{p}, depth {d}": f"rows={p}:depth={d}" for p in (0.875, 0.65) for d in (0.1875, 0.25)},
            "all": "depth=1",
            "tokens as they are": "average=false",
        },
    ),
    "first": Ablation(
        "Rows that enter the tower, as a power of the budget; the same with more rows after the second selection",
        OURS,
        {
            f"{OWN.first:g}": "",
            **_tried("first", *(power for power in (0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75) if power != OWN.first)),
            "0, rows 0.5": "first=0:rows=0.5",
            "0.2, rows 0.5": "first=0.2:rows=0.5",
        },
    ),
    "auto": Ablation(
        "Distance to a selected unit at which `-b auto` stops, at most at the column's budget",
        OURS,
        {"never": ""} | {str(d): f"within={d}" for d in (0.003, 0.01, 0.02, 0.03, 0.05, 0.1)},
    ),
    "time": Ablation(
        "Weight of time in the selection", OURS, {"1.5": ""} | {str(a): f"alpha={a}" for a in (0, 0.5, 1, 2, 4)}
    ),
    "selector": Ablation(
        "What selects after the tower, with reuse in time",
        f"{OURS}:depth=1",
        {"farthest points": ""}
        | {name: f"{REUSE}+{name}" for name in ("random", "divprune", "mmr", "scope", "visionzip")},
    ),
    "fastv": Ablation(
        "After which share of the language model's layers FastV drops tokens", "fastv", {"1/16": ""} | _tried("depth", 0.25, 0.5)
    ),
    "d2pruner": Ablation(
        "D2Pruner's thresholds: share of pivots, cosine at which two tokens are alike",
        "d2pruner",
        {"0.7, 0.8": ""} | _tried("pivots", 0.5, 0.9) | _tried("alike", 0.6, 0.7, 0.9),
    ),
    "visipruner": Ablation(
        "VisiPruner's thresholds: where cosines say that a layer reads, which tokens stay, when all leave",
        "visipruner",
        {"0.995, 0.2, 0.999": ""}
        | _tried("layer", 0.98, 0.99, 0.999)
        | _tried("token", 0.1, 0.4)
        | _tried("exit", 0.99, 0.9999)
        | _tried("shallow", 0.1, 0.3)
        | _tried("latest", 0.35, 0.7),
    ),
}  # fmt: skip


def specs(names: Iterable[str]) -> tuple[str, ...]:
    """Return all variants of some ablations, each once."""
    return tuple(dict.fromkeys(spec for name in names for spec in ABLATIONS[name].specs().values()))


def table(ablation: Ablation, samples: Sequence[dict], budgets: Sequence[float | str]) -> list[str]:
    """Lines of Markdown, a variant a row: for each budget accuracy, the paired difference to the first row in points, with its 95%
    interval over videos, the live share, and the share of tokens that the language model reads."""
    found: dict[tuple, list[dict]] = {}
    for sample in samples:
        if "error" not in sample:
            found.setdefault((sample["method"], sample["budget"]), []).append(sample)
    title = [part for b in budgets for part in (f"-b {budget_text(b)}", "difference", "live", "read")]
    lines = [f"| {ablation.method} | " + " | ".join(title) + " |", "|---" * (len(title) + 1) + "|"]
    base = next(iter(ablation.specs().values()))
    for label, spec in ablation.specs().items():
        cells = []
        for budget in budgets:
            mine = found[spec, budget]
            accuracy = 100 * np.mean([s["right"] for s in mine])
            live, read = (np.mean([s[share] for s in mine]) for share in ("live_share", "kept_share"))
            cells += [
                f"{accuracy:.1f}",
                "" if spec == base else in_points(*paired_difference(mine, found[base, budget])),
                f"{live:.2f}",
                f"{read:.2f}",
            ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def report(names: Iterable[str], run: Evaluation, group: str | None = None) -> str:
    """Return all tables as Markdown, over all questions or those of one group."""
    samples = [s for s in run.samples if "error" not in s and (group is None or group in s["groups"])]
    full = [s for s in samples if s["row"] == FULL]
    settings = run.settings
    of = f", group {group!r}" if group else ""
    lines = [
        f"{settings.data}: {len({s['video'] for s in full}):,} clips{of}, "
        f"{len(full):,} questions; with nothing pruned {100 * np.mean([s['right'] for s in full]):.1f}%.",
    ]
    for name in names:
        lines += ["", f"### {ABLATIONS[name].title}", "", *table(ABLATIONS[name], samples, settings.budgets)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run; an existing run is resumed")
    parser.add_argument("--world", default=SHAPES.name, choices=WORLDS)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--seed", type=int, default=0, help="block of the split's clips")
    parser.add_argument("--limit", type=int, default=150, help="clips")
    parser.add_argument("-b", "--budgets", default="0.25,0.1")
    parser.add_argument("--only", default=",".join(ABLATIONS), help="some of: %(default)s")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--group", help="make the tables of these questions alone, say static or panning")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    args = parser.parse_args(arguments)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in ABLATIONS]:
        parser.error(f"no ablation {unknown[0]!r}: one of {', '.join(ABLATIONS)}")
    budgets = tuple(Budget.parse(text).recorded for text in args.budgets.split(","))
    settings = EvalSettings(
        data_text(args.world, args.split, args.seed),
        budgets,
        specs(names),
        limit=args.limit,
        # On a CPU, which prunes clips as small as these inside the tower too; in the demo's own dtype, whatever the model.
        model=ModelOptions(args.model, device="cpu", dtype="fp32"),
    )
    with demo_videos(clips_asked(args.world, args.split, args.seed, args.limit)) as videos:
        run = Evaluation(settings, videos)
        run.keep_in(args.out, resume=args.out.exists())
        run.load()
        run.run(lambda *what: print(told(*what), file=sys.stderr, flush=True), args.processes)
    text = report(names, run, args.group)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
