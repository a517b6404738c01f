"""IPCV (arXiv 2512.18747): rows that a layer hardly changes leave the encoder, follow similar rows, and come back at its end.

As in the paper and in the authors' code for Qwen2-VL (Perkzi/IPCV): after 3 of 32 layers the 35% of the rows stay that
the last of these layers changed most (L2). Each dropped row remembers the 10 nearest rows that stay (L2). For the next 7
layers it moves as these move on average and stays a key and a value of attention, but no MLP computes it. Then the rows
that stay go on alone, until before the patch merger all dropped rows come back, moved in the same way. So the encoder
computes less, and the language model reads as many tokens as before. A selector after the encoder then keeps the
budget: DART, as in the paper, or the one that is named after `ipcv+`.
Adapted: rows are units of 2x2 patches, not patches, because the merger joins four patches to one token and the rows of a
window must stay whole units. A change or a distance is that of the four patches joined. An image of the paper is a frame
pair here: each keeps 35% of its rows, and rows follow rows of their own frame pair. Their code takes the rows of all
frames at once, which needs a matrix of all pairs over the whole video. Layers are in relative depth, so in a tower
with fewer layers there are fewer that are followed. DART selects after the encoder, not in the language model (see
`dart`). Where a selector reads attention or keys, a dropped row has the mean of the rows that it follows. Changes and
distances are rounded, relative to the greatest, so equal rows are ties, which go by index.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from evoprune.methods.base import EncoderMethod
from evoprune.methods.dart import Dart
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.encoder_plan import Grid, SetAside, Stage, TowerShape


@dataclass(frozen=True)
class Ipcv(EncoderMethod):
    """Fields:

    keep: share of the rows that stay.
    first: share of the tower's layers before rows are dropped.
    follow: share of the layers in which dropped rows follow and are keys and values.
    neighbours: how many rows a dropped row follows.
    """

    name: ClassVar[str] = "ipcv"
    source: ClassVar[str] = "arXiv 2512.18747"
    combines: ClassVar[bool] = True
    tokens: ClassVar[Dart] = Dart()

    keep: float = 0.35
    first: float = 3 / 32
    follow: float = 7 / 32
    neighbours: int = 10

    def __post_init__(self):
        check_ranges(self, keep="(0, 1]", first="[0, 1]", follow="[0, 1]", neighbours="[1, inf)")

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        units = prod(grid[1:])
        first, left = max(1, round(self.first * tower.depth)), max(1, int(self.keep * units))
        if first >= tower.depth or left == units:
            return []
        until = min(first + round(self.follow * tower.depth), tower.depth)
        return [Stage(first, grid[0] * left, SetAside(left, until, self.neighbours))]
