"""What each element of the method is worth: `python -m experiments.ablations OUT`.

All variants run in one evaluation, whose folder is OUT; an existing one is resumed. Each question has a table: accuracy at each
budget, and the paired difference to the table's first row, which is the method as it is or was. Variants are tuned on the split
"validation" and reported once on seeds that were never used (`--split heldout --seed N`).
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evoprune.evaluation.run import Evaluation, Settings
from evoprune.evaluation.scores import FULL
from evoprune.pipeline.options import ModelOptions
from evoprune.pruning.schedule import ALLOCATIONS
from evoprune.pruning.score import LONELY
from experiments.paired import in_points, paired_difference


@dataclass(frozen=True)
class Ablation:
    """A question, and the variants that answer it: by label, their settings beyond those of `method`, a name with or without
    settings."""

    title: str
    method: str
    variants: dict[str, str]

    def specs(self) -> dict[str, str]:
        """Variants by label, as names that `methods.get` takes. Of two values of a setting it uses the last."""
        return {label: f"{self.method}:{args}" if args else self.method for label, args in self.variants.items()}


PAPER = "evoprune-paper:allocation=skip:attention=0.1:critical=0.1"  # the paper's settings; the defaults follow from these tables
OURS = "evoprune"
LATE = (
    "evoprune:depth=1:merge=0.5:last=0.25:alpha=4:reuse=12"  # rows merge early, and are selected after the tower alone
)
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
    "lonely": Ablation(
        "Whose loneliness counts, at weight 0.3",
        PAPER,
        {name: f"diversity=0.3:lonely={name}" for name in LONELY},
    ),
    "neighbours": Ablation(
        "Neighbours of the density, at weight 0.3",
        PAPER,
        {str(n): f"diversity=0.3:neighbours={n}" for n in (4, 1, 16)},
    ),
    "attention": Ablation(
        "Attention preserved", PAPER, {"0.1": ""} | {str(w): f"attention={w}" for w in (0, 0.3, 1.0)}
    ),
    "critical": Ablation(
        "Critical share", PAPER, {"0.1": ""} | {str(share): f"critical={share}" for share in (0, 0.05, 0.2, 0.4)}
    ),
    "paper": Ablation(
        "The paper's ablations: without either, and without both",
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
    "split": Ablation("The two sets", PAPER, {"alternate": "", "checkerboard": "split=checkerboard"}),
    "direction": Ablation("Whose place a merged row takes", PAPER, {"destination": "", "attended": "survivor=attended"}),
    "size": Ablation("Merged rows count in attention", PAPER, {"by size": "", "once": "size_bias=false"}),
    "scope": Ablation(
        "Where rows merge",
        PAPER,
        {"windows, then grids": "", "grids": "windows=false", "2 grids": "block=2", "4 grids": "block=4"},
    ),
    "together": Ablation(
        "What won, together",
        PAPER,
        {
            "the paper's form": "",
            "no attention": NO_ATTENTION,
            "decreasing": "allocation=decreasing",
            "decreasing, no attention (the defaults)": f"allocation=decreasing:{NO_ATTENTION}",
            "the same, 4 grids": f"allocation=decreasing:{NO_ATTENTION}:block=4",
            "the same, 4 grids, all layers": f"allocation=decreasing:{NO_ATTENTION}:block=4:first=0:last=1",
        },
    ),
    "depth": Ablation(
        "After which share of the layers rows are selected",
        OURS,
        {"0.125": ""}
        | {str(depth): f"depth={depth}" for depth in (0.25, 0.375, 0.5, 0.75)}
        | {"1, merging early": "depth=1:merge=0.5:last=0.25"},
    ),
    "merging": Ablation(
        "Rows left by merging before the choice", OURS, {"all": ""} | {str(m): f"merge={m}" for m in (0.75, 0.5, 0.35)}
    ),
    "rows": Ablation(
        "The encoder's budget: rows that go on after the choice",
        OURS,
        {"as many as are read": ""} | {str(share): f"encoder_budget={share}" for share in (1, 0.5, 0.35, 0.2, 0.15, 0.1, 0.05)},
    ),
    "spending": Ablation(
        "Rows and tokens go where something happens, or evenly to all grids",
        OURS,
        {"where something happens": "", "half of them evenly": "floor=0.5", "evenly": "floor=1"},
    ),
    "references": Ablation(
        "References in time: levels of 255 that count as change",
        OURS,
        {"8": ""} | {str(level): f"reuse={level}" for level in (0, 3, 5, 12, 16)},
    ),
    "refresh": Ablation(
        "In how many grids each unit has its turn to be encoded anew",
        OURS,
        {"never": ""} | {str(grids): f"refresh={grids}" for grids in (16, 8, 4)},
    ),
    "stands": Ablation(
        "What a selected row is, and as how many units it counts in the language model's attention",
        OURS,
        {
            "mean of its units, their number to the power 0.5": "",
            "itself, one": "average=false:count=0",
            "mean, one": "count=0",
            "itself, power 0.5": "average=false",
            **{f"mean, power {power}": f"count={power}" for power in (0.25, 0.75, 1)},
        },
    ),
    "late rows": Ablation(
        "With the choice after the tower: the encoder's budget",
        LATE,
        {"0.5": ""} | {str(share): f"encoder_budget={share}" for share in (0.75, 0.35, 0.25, 0.15)},
    ),
    "late rows alone": Ablation(
        "With the choice after the tower: the encoder's budget without references",
        LATE,
        {"0.5": "reuse=0"} | {str(share): f"reuse=0:encoder_budget={share}" for share in (0.75, 0.35, 0.25, 0.15)},
    ),
    "early": Ablation(
        "With the choice after the tower: layers that merge",
        LATE,
        {"0-0.25": ""}
        | {f"{a}-{b}": f"first={a}:last={b}" for a, b in ((0, 0.5), (0.25, 0.5), (0.25, 0.75), (0.5, 0.75))},
    ),
    "block": Ablation(
        "With the choice after the tower: grids of a block", LATE, {"4": ""} | {str(n): f"block={n}" for n in (1, 2, 8)}
    ),
    "score": Ablation(
        "With the choice after the tower: the paper's terms in our merging",
        LATE,
        {"none": "", "diversity": "diversity=0.1", "attention": "attention=0.1:critical=0.1"},
    ),
    "halves": Ablation(
        "With the choice after the tower: the two sets", LATE, {"checkerboard": "", "alternate": "split=alternate"}
    ),
    "similarity": Ablation(
        "With the choice after the tower: what similarity is measured on",
        LATE,
        {"keys": "", "keys after rotary": "features=keys_rotary", "hidden states": "features=hidden"},
    ),
    "auto": Ablation(
        "How near a chosen unit every other is before `-b auto` stops, at most at the column's budget",
        OURS,
        {"all of the budget": ""} | {str(d): f"within={d}" for d in (0.01, 0.02, 0.03, 0.05, 0.1)},
    ),
    "time": Ablation("Weight of time in the choice", OURS, {"1.5": ""} | {str(a): f"alpha={a}" for a in (0, 0.5, 1, 2, 4)}),
    "choice": Ablation(
        "With the choice after the tower: who chooses",
        LATE,
        {"own": ""} | {name: f"choice={name}" for name in ("random", "divprune", "mmr", "scope", "visionzip")},
    ),
}  # fmt: skip


def specs(names: Iterable[str]) -> tuple[str, ...]:
    """All variants of some ablations, each once."""
    return tuple(dict.fromkeys(spec for name in names for spec in ABLATIONS[name].specs().values()))


def table(ablation: Ablation, samples: Sequence[dict], budgets: Sequence[float]) -> list[str]:
    """Lines of Markdown, a variant a row: for each budget accuracy, the paired difference to the first row in points, with its 95%
    interval over videos, the live share, and the share of tokens that the language model reads."""
    found: dict[tuple, list[dict]] = {}
    for sample in samples:
        if "error" not in sample:
            found.setdefault((sample["method"], sample["budget"]), []).append(sample)
    title = [part for b in budgets for part in (f"-b {b:g}", "difference", "live", "read")]
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
    """All tables as Markdown, of the questions of a group if one is given."""
    samples = [s for s in run.samples if "error" not in s and (group is None or group in s["groups"])]
    full = [s for s in samples if s["row"] == FULL]
    settings, of = run.settings, f", group {group!r}" if group else ""
    lines = [
        f"{len({s['video'] for s in full}):,} clips of split {settings.split!r}, block {settings.seed}{of}, "
        f"{len(full):,} questions; with nothing pruned {100 * np.mean([s['right'] for s in full]):.1f}%.",
    ]
    for name in names:
        lines += ["", f"### {ABLATIONS[name].title}", "", *table(ABLATIONS[name], samples, settings.budgets)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--seed", type=int, default=0, help="block of the split's clips")
    parser.add_argument("--limit", type=int, default=150, help="clips")
    parser.add_argument("-b", "--budgets", default="0.25,0.1")
    parser.add_argument("--only", default=",".join(ABLATIONS), help="some of: %(default)s")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--group", help="tables of these questions alone, say static or panning; the run is the same")
    parser.add_argument("--markdown", type=Path, help="write the tables there as well")
    args = parser.parse_args(arguments)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in ABLATIONS]:
        parser.error(f"no ablation {unknown[0]!r}: one of {', '.join(ABLATIONS)}")
    budgets = tuple(float(b) for b in args.budgets.split(","))
    settings = Settings(
        "demo",
        budgets,
        specs(names),
        split=args.split,
        seed=args.seed,
        limit=args.limit,
        model=ModelOptions(args.model, dtype="fp32"),  # as the demo's own; all that know its clips are as small
    )
    run = Evaluation(settings, None)
    run.keep_in(args.out, resume=args.out.exists())
    run.load()
    run.run(lambda what: print(what, file=sys.stderr, flush=True), args.processes)
    text = report(names, run, args.group)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
