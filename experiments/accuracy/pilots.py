"""Measure what parts of newer methods add to `evoprune`: `python -m experiments.accuracy.pilots OUT --seed N --limit N`.

Each pilot changes `evoprune` in one or two ways, and keeps the number of tokens and rows. The tables show the accuracy kept, and
the paired difference from `evoprune` in percentage points with its 95% interval, in each set and in all sets together.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from evoprune.backend import snap, tube_radii
from evoprune.bench import shared
from evoprune.contrib.idpruner import VisionSelector, importance
from evoprune.contrib.mmr import diverse
from evoprune.contrib.shared import apportion
from evoprune.contrib.vcast import curvature
from evoprune.methods import FarthestPoints, Grid, Selection, Stage, Tokens, TowerShape
from evoprune.methods.evoprune import EvoPruneMethod
from evoprune.methods.farthest import STEPS, assign_clusters, grid_tables, points_of
from evoprune.util import budget_text
from experiments import tables
from experiments.accuracy.frontier import FULL, METHOD, SETS, evaluated, kept, samples_of
from experiments.accuracy.paired import in_points, paired_difference

DEFAULT = "evoprune"
PILOTS = {
    "evoprune": "the default",
    "pilot:curve=1": "curvature",
    "pilot:same=1": "duplicates",
    "evoprune:average=false": "kept values",
    "pilot:score=0.25": "scores",
    "pilot:mix=0.5": "scores, as in `idpruner`",
    "pilot:curve=1:same=1": "curvature, duplicates",
    "pilot:curve=1:average=false": "curvature, kept values",
    "pilot:curve=1:score=0.25": "curvature, scores",
    "pilot:same=1:average=false": "duplicates, kept values",
    "pilot:same=1:score=0.25": "duplicates, scores",
    "pilot:score=0.25:average=false": "scores, kept values",
}
TEMPERATURE = 0.7  # as in V-CAST


@dataclass(frozen=True)
class PilotPoints(FarthestPoints):
    """The token selection with a pilot's changes. See `Pilot` for the fields."""

    curve: float = 0.0
    score: float = 0.0
    mix: float = 0.0

    def select(self, tokens: Tokens, keep: int) -> Selection:
        points = points_of(tokens.rows, tokens.unit_to_row, tokens.grid, self.alpha)
        units = len(points.row)
        if self.mix:
            chosen = diverse(tokens.features, importance(VisionSelector().scores(tokens)), keep, self.mix)
        else:
            _, turn, tubes = grid_tables(points.grid, str(points.row.device))
            first = (points.salience * (STEPS / 2)).round_()
            radii = tube_radii(points.place, points.half, points.weight, first, points.row, points.time, tubes, units)
            if self.score:
                scores = VisionSelector().scores(tokens)
                radii = (radii * soft_weight(scores, keep / units) ** self.score * STEPS).round_()
            order = torch.add(turn, radii.long(), alpha=units)
            if self.curve and tokens.grid[0] > 1:
                order = self.guaranteed(order, tokens, keep)
            chosen = order.topk(keep).indices.sort().values
        unit_to_token = assign_clusters(points, chosen)
        return Selection(chosen, unit_to_token, size=self._sizes(unit_to_token, keep), averages=self.average)

    def guaranteed(self, order: torch.Tensor, tokens: Tokens, keep: int) -> torch.Tensor:
        """Move the highest units of each frame pair ahead of all others, in numbers that follow V-CAST's curvature."""
        pairs = tokens.grid[0]
        x = tokens.by_pair(tokens.features.float())
        vector = F.normalize(x.mean(1), dim=1, eps=1e-6)
        weights = (snap(curvature(vector)).double() / TEMPERATURE).softmax(0).tolist()
        share = round(self.curve * keep)
        least = min(1, share // pairs)
        counts = apportion(share - least * pairs, weights, [x.shape[1] - least] * pairs)
        by_pair = order.view(pairs, -1)
        rank = by_pair.argsort(1, descending=True).argsort(1)
        ahead = rank < torch.tensor(counts)[:, None] + least
        return (by_pair + ahead * (1 << 60)).flatten()


def soft_weight(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Return VisionSelector's soft weights: sigmoid(score + offset), with the offset for which their mean is `share`."""
    low, high = -scores.max() - 20, -scores.min() + 20
    for _ in range(50):
        middle = (low + high) / 2
        below = (scores + middle).sigmoid().mean() < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (scores + low).sigmoid()


@dataclass(frozen=True)
class Pilot(EvoPruneMethod):
    """`evoprune` with changes to the selection of tokens."""

    name: ClassVar[str] = "pilot"

    curve: float = 0.0  # share of the tokens that frame pairs get by curvature, as in V-CAST
    score: float = 0.0  # exponent of the soft weight by which a unit's radius is multiplied
    mix: float = (
        0.0  # weight of importance in IDPruner's selection, which replaces the third selection; 0 for the radii
    )
    early: float = 0.0  # the same in all three selections
    same: int = 0  # 1 to drop exact duplicates first, as in PixelPrune, instead of reuse

    def __post_init__(self):
        if self.same:
            object.__setattr__(self, "reuse", 0.0)
        super().__post_init__()

    @property
    def predict(self) -> bool:
        return self.same > 0

    @property
    def tokens(self) -> PilotPoints:
        plain = super().tokens
        return PilotPoints(
            plain.alpha,
            plain.floor,
            plain.average,
            plain.count,
            curve=self.curve or self.early,
            score=self.score,
            mix=self.mix,
        )

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        stages = EvoPruneMethod(self.reuse).stages(tower, grid, keep)
        if not self.early:
            return stages
        return [replace(stage, reduce=PilotPoints(**vars(stage.reduce), curve=self.early)) for stage in stages]


def register(folder: Path) -> None:
    """Make `Pilot` available as the method `pilot`, as a plug-in in `folder`."""
    metadata = folder / "pilots-1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pilots\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[evoprune.methods]\npilot = experiments.accuracy.pilots:Pilot\n")
    sys.path.insert(0, str(folder))


def work_of_rows(plan) -> tuple:
    """Return a cache key for tower rows, so that methods that differ only in the selection of tokens share them."""
    inside = plan.stages
    needs = frozenset()
    if plan.token_stage:
        inside = plan.stages[:-1]
        needs = plan.token_stage.selector.needs
    return plan.grid, plan.keep, plan.reuse, plan.predict, inside, needs


def table(samples: dict[str, list[dict]], budgets: Sequence[float | str], methods: dict[str, str]) -> list[str]:
    """Return a Markdown table with a row for each pilot and budget. The worst set of a row is in bold."""
    lines = []
    for budget in budgets:
        for method, words in methods.items():
            cells = []
            whole = []
            rows = []
            every: list[dict] = []
            others: list[dict] = []
            for name_of_set, each in samples.items():
                full = [s for s in each if s["row"] == FULL]
                mine, default = (
                    [s for s in each if (s["row"], s["method"], s["budget"]) == (METHOD, name, budget)]
                    for name in (method, DEFAULT)
                )
                if not mine:
                    cells.append("")
                    whole.append(math.inf)
                    continue
                whole.append(kept(mine, full))
                rows.append(f"{np.mean([s['live_share'] for s in mine]):.3f}")
                # The clips of a world are the same for both weights, so the interval is over clips.
                every += [s | {"id": f"{name_of_set}: {s['id']}"} for s in mine]
                others += [s | {"id": f"{name_of_set}: {s['id']}"} for s in default]
                cells.append(f"{whole[-1]:.1f}")
                if method != DEFAULT:
                    cells[-1] += f", {in_points(*paired_difference(mine, default))}"
            worst = whole.index(min(whole))
            cells[worst] = f"**{cells[worst]}**"
            together = ""
            if method != DEFAULT and math.inf not in whole:
                together = in_points(*paired_difference(every, others))
            lines.append([words, f"`-b {budget_text(budget)}`", " / ".join(dict.fromkeys(rows)), *cells, together])
    return tables.table(["", "", "rows", *samples, "all sets"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--seed", type=int, default=72, help="block of the split's clips")
    parser.add_argument("--limit", type=int, default=60, help="clips of each set")
    parser.add_argument("-b", "--budget", default="balanced,fast")
    parser.add_argument("--only", default=";".join(PILOTS), help="methods, separated by semicolons")
    parser.add_argument("--sets", default=";".join(SETS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="folders of other runs on the same clips")
    args = parser.parse_args(arguments)
    register(args.out / "plugin")
    shared._tower_work = work_of_rows
    methods = {method: PILOTS.get(method, f"`{method}`") for method in args.only.split(";")}
    args.method = ",".join(methods)
    samples = {name: evaluated(args.out, name, args) for name in args.sets.split(";")}
    for name, each in samples.items():
        for folder in args.also:
            each += [s for s in samples_of(folder, name) if s["row"] == METHOD]
        full = [s for s in each if s["row"] == FULL]
        right = 100 * sum(s["right"] for s in full) / len(full)
        print(f"- {name}: {len(full):,} questions about {len({s['video'] for s in full}):,} clips; full {right:.1f}%")
    found = {s["method"] for each in samples.values() for s in each if s["row"] == METHOD}
    methods = {method: PILOTS.get(method, f"`{method}`") for method in [*PILOTS, *methods] if method in found}
    budgets = list(dict.fromkeys(s["budget"] for each in samples.values() for s in each if s["row"] == METHOD))
    print("\n".join(["", *table(samples, budgets, methods)]))


if __name__ == "__main__":
    main()
