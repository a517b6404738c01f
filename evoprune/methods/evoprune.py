"""evoprune, this project's own method: encode once what repeats itself, merge early what is alike, choose last what is read.

Before the tower each unit is compared with its reference, the same place where it was last encoded, and encoded only if it has
changed (pruning/reference.py). The rows that are left merge between early layers by similarity alone, inside blocks of neighbouring
grids. Every unit of the clip then has a feature, its owner's, at its own place and time, and of all these the tokens for the
language model are chosen, far apart in features and in time (pruning/select.py). The encoder's budget and the language
model's are two. A chosen token is the mean of the units it is nearest to, and the language model's attention counts it as more
than one: what many units show would otherwise weigh as little as what one shows.
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
from evoprune.pruning.select import ALPHA, choose_units, nearest_chosen

OWN = "own"
# Share of the units that the encoder goes on computing at lower budgets, too.
LEAST = 0.5
# How near a chosen token every unit is under `--budget auto`.
WITHIN = 0.1


@dataclass(frozen=True)
class EvoPrune(EvoPrunePaper):
    """Fields, beside those of `evoprune-paper`, which say how rows merge:

    reuse: by how many levels of 255 a unit must differ from its reference to be encoded anew; 0 for no references.
    refresh: in so many grids each unit has its turn to be encoded anew, wherever anything in the grid has changed: what surrounds
        it is part of its feature; 0 for never.
    encoder_budget: share of a block's units that are left as rows after merging, whatever the budget is; None for the budget
        itself, but at least LEAST.
    adaptive: whether what blocks that repeat their references leave of their share goes to later ones in which more is new. In
        all no more is spent than the shares add up to, and no block gets less than without; but clips cost more, as less is merged.
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
    last: float = 0.25
    diversity: float = 0.0
    attention: float = 0.0
    critical: float = 0.0
    split: str = "checkerboard"
    block: int = 4
    reuse: float = THRESHOLD
    refresh: int = 0
    encoder_budget: float | None = None
    adaptive: bool = False
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
        return replace(self, alpha=ALPHA, within=0.0, average=True, count=0.0, choice=OWN)

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
        return max(budget, LEAST) if self.encoder_budget is None else self.encoder_budget

    def allowance(self, units: int, due: int) -> int:
        if self.encoder_budget is None:
            return max(due, round(LEAST * units), 1)
        return max(round(self.encoder_budget * units), 1)

    def select(self, tokens: Tokens, keep: int) -> torch.Tensor | Selection:
        if self.choice != OWN:
            return self.chooser.select(tokens, keep)
        seconds = [tokens.seconds_per_grid * grid for grid in range(tokens.grid[0])]
        video = tokens.rows, tokens.owner, tokens.grid, seconds
        least = keep_count(AUTO_LEAST, len(tokens.owner))
        kept = choose_units(*video, keep, alpha=self.alpha, within=self.within, least=least)
        if len(kept) == len(tokens.owner) or not (self.average or self.count):
            return kept
        stands = nearest_chosen(*video, kept, alpha=self.alpha)
        counts = tally(stands, len(kept)).float() ** self.count if self.count else None
        if not self.average:
            stands = torch.full_like(stands, -1).scatter(0, kept, stands[kept])
        return Selection(kept, stands, counts=counts)
