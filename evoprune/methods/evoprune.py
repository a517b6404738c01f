"""evoprune, this project's own method: encode what changes, choose early what stands for the rest, and read that.

Before the tower each unit is compared with its reference, the same place where it was last encoded, and encoded only if it has
changed (pruning/reference.py). After the first eighth of the tower's layers every unit of the clip has a feature, its row's, at its
own place and time. The rows for the other layers are chosen among all of these, far apart in features and in time
(pruning/select.py). A chosen row is the mean of the units it is nearest to and stands for them from there on; where the same thing
is chosen at another time too, it sees there what has changed around it. The language model reads these rows, and its attention
counts each as more than one: what many units show would otherwise weigh as little as what one shows.

The encoder's budget and the language model's are two: where they differ the choice is made once more, after the tower. Rows may
also merge before the choice, by similarity alone and inside blocks of neighbouring grids, as `evoprune-paper` does it; so they did
before the choice was made inside the tower (`depth=1:merge=0.5`), which costs twice as many rows (docs/ablations.md).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from evoprune import methods
from evoprune.methods.base import Method, Selection, Tokens
from evoprune.methods.evoprune_paper import EvoPrunePaper
from evoprune.pruning.budget import AUTO_LEAST, keep_count
from evoprune.pruning.indices import tally
from evoprune.pruning.reference import THRESHOLD
from evoprune.pruning.schedule import TowerShape
from evoprune.pruning.select import ALPHA, choose_units, nearest_chosen, points_and_salience

OWN = "own"
# How near a chosen token every unit is under `--budget auto`.
WITHIN = 0.01


@dataclass(frozen=True)
class EvoPrune(EvoPrunePaper):
    """Fields, beside those of `evoprune-paper`, which say how rows merge:

    reuse: by how many levels of 255 a unit must differ from its reference to be encoded anew; 0 for no references.
    refresh: in so many grids each unit has its turn to be encoded anew, wherever anything in the grid has changed: what surrounds
        it is part of its feature; 0 for never.
    merge: share of a block's units that are left as rows after merging, unless as many go on anyway; 1 for no merging.
    depth: part of the tower's layers after which the rows for the rest are chosen; 1 for none of them, but after the tower.
    encoder_budget: share of the units that are rows from there on, whatever the budget is, if there are as many; None for the
        budget itself. Where none are chosen inside the tower, the share that is left after merging.
    floor: share of an even spread over the grids that each of them gets at least of the rows that are chosen; 0 for none, 1 for the
        even spread itself.
    alpha: weight of time in the choice.
    within: choose no more tokens once no unit is farther than this from a chosen one, but a twentieth of all at least; 0 for
        as many as the budget says. Only with the `own` choice.
    average: whether a chosen token is the mean of the units nearest to it, itself among them, and not itself alone.
    count: as how many tokens the language model's attention counts it: the number of those units to this power. 0 for one, 1 for
        all, as ToMe does inside an encoder (arXiv 2210.09461, section 3). Both with the `own` choice alone.
    choice: who chooses the tokens to be read: `own`, or a method that acts after the encoder, by name. It sees every unit of the
        clip, at its own place, with what its row has.
    """

    name: ClassVar[str] = "evoprune"
    selects: ClassVar[bool] = True

    allocation: str = "mean"
    first: float = 0.0
    last: float = 0.125
    diversity: float = 0.0
    attention: float = 0.0
    critical: float = 0.0
    split: str = "checkerboard"
    block: int = 4
    reuse: float = THRESHOLD
    refresh: int = 0
    merge: float = 1.0
    depth: float = 0.125
    encoder_budget: float | None = None
    floor: float = 0.0
    alpha: float = ALPHA
    within: float = 0.0
    average: bool = True
    count: float = 0.5
    choice: str = OWN

    def __post_init__(self):
        super().__post_init__()
        if not (self.reuse >= 0 and all(0 <= x < math.inf for x in (self.alpha, self.within, self.count))):
            raise ValueError("reuse, alpha, within and count are at least 0")
        if self.refresh < 0:
            raise ValueError("refresh is a number of grids, or 0")
        if not 0 <= self.floor <= 1:
            raise ValueError("floor is a share of an even spread, from 0 to 1")
        if not (0 < self.merge <= 1 and 0 < self.depth <= 1):
            raise ValueError("merge is a share of units, depth of layers, above 0 and up to 1")
        if self._narrows and self.merge < 1 and self.last > self.depth:
            raise ValueError("rows merge before they are chosen: last is at most depth")
        if self.encoder_budget is not None and not 0 < self.encoder_budget <= 1:
            raise ValueError("encoder_budget is a share of units, above 0 and up to 1")
        if self.reuse and not self.size_bias:
            # Where references have merged, a later chunk still has keys for each of their places: as many as they stand for.
            raise ValueError("reuse needs size_bias; without it, set reuse to 0")
        if self.choice != OWN and self.chooser.acts != "after":
            raise ValueError(f"choice is {OWN} or a method that acts after the encoder, not {self.choice!r}")
        if self.within and self.choice != OWN:
            raise ValueError(f"within is for the choice {OWN}")

    @property
    def chooser(self) -> Method:
        return self if self.choice == OWN else methods.get(self.choice)

    @property
    def merger(self) -> Method:
        if self._narrows:
            return replace(self, count=0.0)
        return replace(self, alpha=ALPHA, within=0.0, floor=0.0, average=True, count=0.0, choice=OWN, depth=1.0)

    @property
    def exact(self) -> bool:
        return not self.within if self.choice == OWN else self.chooser.exact

    @property
    def reads_question(self) -> bool:
        return self.choice != OWN and self.chooser.reads_question

    @property
    def needs_after(self) -> frozenset[str]:
        return frozenset() if self.choice == OWN else self.chooser.needs_after

    def automatic(self) -> "EvoPrune":
        return replace(self, within=self.within or WITHIN) if self.choice == OWN else super().automatic()

    def encoder_share(self, budget: float) -> float:
        if self.encoder_budget is not None:
            return self.encoder_budget
        return budget if self._narrows else max(budget, self.merge)

    def allowance(self, units: int, due: int) -> int:
        if self._narrows:
            left = max(1, round(self.merge * units))
            goes_on = due if self.encoder_budget is None else self.encoder_budget * units
            return left if left > goes_on else units  # the choice alone brings it down to as many
        if self.encoder_budget is not None:
            return max(1, round(self.encoder_budget * units))
        return max(due, round(self.merge * units), 1)

    @property
    def _narrows(self) -> bool:
        """Whether rows are chosen inside the tower; where others choose, or all units go on, there is nothing to choose there."""
        return self.depth < 1 and self.choice == OWN and self.encoder_budget != 1

    def narrows_after(self, tower: TowerShape, budget: float) -> int | None:
        if not self._narrows:
            return None
        return min(max(1, round(self.depth * tower.depth)), tower.depth - 1) or None  # a tower of one layer has no rest

    def narrow(self, tokens: Tokens, keep: int) -> Selection | None:
        most, grids = self._rows(len(tokens.owner), keep), tokens.owner.view(tokens.grid[0], -1)
        if most >= len(tokens.rows) and (grids == grids[0]).all():
            return None  # a picture that stands still: every row has seen all there is around it
        return self._chosen(tokens, min(most, len(tokens.rows)))

    def _rows(self, units: int, keep: int) -> int:
        """How many go on."""
        if self.encoder_budget is not None:
            return max(1, round(self.encoder_budget * units))
        return keep

    def select(self, tokens: Tokens, keep: int) -> torch.Tensor | Selection:
        if self.choice != OWN:
            return self.chooser.select(tokens, keep)
        if tokens.home is not None and self._is_enough(len(tokens.home), keep, len(tokens.owner)):
            return Selection(tokens.home, tokens.owner, None, self._counts(tokens.owner, len(tokens.home)))
        if keep == len(tokens.owner):
            return torch.arange(keep)
        return self._chosen(tokens, keep)

    def _is_enough(self, rows: int, keep: int, units: int) -> bool:
        """Whether the rows that were chosen inside the tower are what is to be read."""
        return rows == keep or (self.within > 0 and keep_count(AUTO_LEAST, units) <= rows <= keep)

    def _chosen(self, tokens: Tokens, keep: int) -> Selection:
        """`keep` units, or as many as it takes, and which of them stands for each of the others."""
        seconds = [tokens.seconds_per_grid * grid for grid in range(tokens.grid[0])]
        video = tokens.rows, tokens.owner, tokens.grid, seconds
        known = points_and_salience(tokens.rows, tokens.owner)
        least = keep_count(AUTO_LEAST, len(tokens.owner))
        kept = choose_units(
            *video, keep, alpha=self.alpha, within=self.within, least=least, floor=self.floor, known=known
        )
        stands = nearest_chosen(*video, kept, alpha=self.alpha, known=known)
        alone = None if self.average else torch.zeros(len(stands), device=stands.device).index_fill_(0, kept, 1.0)
        return Selection(kept, stands, alone, self._counts(stands, len(kept)))

    def _counts(self, stands: torch.Tensor, tokens: int) -> torch.Tensor | None:
        if not self.count or tokens == len(stands):
            return None
        return tally(stands, tokens).float() ** self.count
