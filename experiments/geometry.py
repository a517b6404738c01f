"""How much the selection of `evoprune` depends on the geometry of features: `python -m experiments.geometry`.

Rows are taken as the selection sees them in validation clips, and changed in ways that carry no information: what the other layers
compute of a row could stay as it is, because the change can be folded into their weights. A selection that follows the content
stays nearly as it is, too. The table gives the share of the units that are selected before and after a change, for the distance of
`evoprune` and for those of `experiments.distances`, which also says what each is worth.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from evoprune.methods.chain import Pipeline
from evoprune.methods.evoprune import EvoPrune, FarthestPoints
from evoprune.methods.plans import Grid, Stage, TowerShape
from evoprune.methods.types import Selection, Tokens
from evoprune.session.engine import Engine
from evoprune.session.inputs import open_inputs
from evoprune.session.loading.model import LoadedModel, load_model
from evoprune.session.options import ModelOptions, PruneOptions
from experiments.demo.write import clips_asked, demo_video
from experiments.distances import DISTANCES, using

Change = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Recorder(FarthestPoints):
    """The selector of `evoprune`, which keeps what it was given."""

    seen: list[tuple[Tokens, int]] = field(default_factory=list, compare=False)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        self.seen.append((tokens, keep))
        return super().select(tokens, keep)


@dataclass(frozen=True)
class Recorded(EvoPrune):
    """`evoprune` with a `Recorder` between two layers."""

    recorder: Recorder = field(default_factory=lambda: Recorder(average=False), metadata={"method": True})

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        made = super().stages(tower, grid, keep)
        return [replace(stage, reduce=self.recorder) if stage.first_layer else stage for stage in made]


def tokens_of(loaded: LoadedModel, budget: float, block: int, clips: int, world: str) -> list[tuple[Tokens, int]]:
    """What the selection is given in each clip: its tokens, and K."""
    found = []
    with TemporaryDirectory() as folder:
        for clip in clips_asked(world, "validation", block, clips):
            method = Recorded()
            engine = Engine(loaded, PruneOptions(budget, "evoprune"), Pipeline(encoder=method))
            with (
                demo_video(clip, Path(folder)) as video,
                closing(open_inputs(engine, [video.path])) as opened,
            ):
                opened.encode()
            found += method.recorder.seen
    return found


# What is done to rows [E, D]. Lengths are relative to the mean length of the rows.


def noise(share: float) -> Change:
    """Noise that is this share of a row's length: what "nearly the same" means."""

    def change(rows: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        drawn = F.normalize(_normal(rows.shape, random), dim=1)
        return rows + share * rows.norm(dim=1, keepdim=True) * drawn

    return change


def common(length: float) -> Change:
    """One vector added to all rows."""

    def change(rows: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        return rows + length * rows.norm(dim=1).mean() * F.normalize(_normal((1, rows.shape[1]), random), dim=1)

    return change


def large_channels(length: float) -> Change:
    """Four more channels that are large in all rows, and vary by a tenth, as in trained towers."""

    def change(rows: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        size = length * rows.norm(dim=1).mean() / 2 * (1 + 0.1 * _normal((len(rows), 1), random))
        return torch.cat([rows, size * torch.tensor([[1.0, -1.0, 1.0, -1.0]])], 1)

    return change


def gains(deviation: float) -> Change:
    """Each channel multiplied by a number of its own, log-normal: a norm's gain, which the next layer's weights undo."""

    def change(rows: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        return rows * (deviation * _normal((1, rows.shape[1]), random)).exp()

    return change


def sink(rows: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """The row nearest to the mean becomes one of the kind that draws most attention: as long as 30 rows, in two channels."""
    rows = rows.clone()
    row = (rows - rows.mean(0)).norm(dim=1).argmin()
    rows[row] = 0
    rows[row, :2] = 30 * rows.norm(dim=1).mean() / 2**0.5
    return rows


def _normal(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float32)


CHANGES: dict[str, Change] = {
    "noise of 1%": noise(0.01),
    "noise of 10%": noise(0.1),
    **{f"a common part of {length} lengths": common(length) for length in (1, 3, 10)},
    **{f"large channels, {length} lengths": large_channels(length) for length in (1, 3, 10)},
    **{f"gains, log-normal, {deviation}": gains(deviation) for deviation in (0.3, 1)},
    "one row of 30 lengths": sink,
}

DUPLICATES = 2000


def duplicated(tokens: Tokens, random: torch.Generator) -> Tokens:
    """More units at the right of each frame pair, `DUPLICATES` in all: its row nearest to the mean, with noise of 1%."""
    count, height, width = tokens.grid
    more = -(-DUPLICATES // (count * height))
    near = (tokens.rows - tokens.rows.mean(0)).norm(dim=1).argmin()
    rows = noise(0.01)(tokens.rows[near].expand(count * height * more, -1), random)
    added = len(tokens.rows) + torch.arange(len(rows)).view(count, height, more)
    owner = torch.cat([tokens.owner.view(tokens.grid), added], 2).flatten()
    return replace(tokens, rows=torch.cat([tokens.rows, rows]), owner=owner, grid=(count, height, width + more))


def shares_kept(tokens: Tokens, keep: int, selector: FarthestPoints) -> Iterator[tuple[str, float]]:
    """For each change, which share of the selected units is selected with it, too."""
    tokens = replace(tokens, rows=tokens.rows.float())
    before = set(selector.select(tokens, keep).kept.tolist())
    for name, change in CHANGES.items():
        random = torch.Generator().manual_seed(0)
        after = selector.select(replace(tokens, rows=change(tokens.rows, random)), keep).kept.tolist()
        yield name, len(before & set(after)) / len(before)
    wider = duplicated(tokens, torch.Generator().manual_seed(0))
    (_, height, width), total = tokens.grid, wider.grid[2]
    kept = selector.select(wider, keep).kept
    pair, place = kept // (height * total), kept % (height * total)
    row, column = place // total, place % total
    own = (pair * height * width + row * width + column)[column < width].tolist()
    yield f"{DUPLICATES:,} near-duplicates more", len(before & set(own)) / len(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", action="append", default=[], help="default: demo, and tests/demo/second")
    parser.add_argument("-b", "--budget", type=float, action="append", default=[], help="default: 0.25 and 0.1")
    parser.add_argument("--world", default="shapes")
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--clips", type=int, default=30)
    args = parser.parse_args()
    for name in args.model or ["demo", "tests/demo/second"]:
        loaded = load_model(ModelOptions(name, dtype="fp32"))
        for budget in args.budget or [0.25, 0.1]:
            seen = tokens_of(loaded, budget, args.block, args.clips, args.world)
            print(f"\n{name}, -b {budget:g}, {len(seen)} clips: units that stay selected, %\n")
            print(table(seen), flush=True)


def table(seen: list[tuple[Tokens, int]]) -> str:
    """Markdown: a row for each change, a column for each distance."""
    columns: dict[str, dict[str, float]] = {}
    for name, places in DISTANCES.items():
        with using(places):
            found = [dict(shares_kept(tokens, keep, FarthestPoints())) for tokens, keep in seen]
        columns[name] = {change: sum(f[change] for f in found) / len(found) for change in found[0]}
    lines = ["| change | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for change in next(iter(columns.values())):
        lines.append(f"| {change} | " + " | ".join(f"{100 * column[change]:.0f}" for column in columns.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
