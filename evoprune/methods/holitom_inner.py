"""HoliTom's stage inside the language model (arXiv 2505.21334): FastV after 18 of 28 layers, and what is dropped merges."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.fastv import FastV
from evoprune.methods.settings import Part
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import closest
from evoprune.pruning.types import LayerTokens, Selection

LEAST = 2.0**-126  # of a weight; float32 has no smaller number of full precision


@dataclass(frozen=True)
class HoliTomInner(FastV):
    name: ClassVar[str] = "holitom-inner"
    source: ClassVar[str] = "arXiv 2505.21334"
    default_share: ClassVar[float] = 0.5

    depth: Part = 18 / 28

    def select(self, tokens: LayerTokens) -> Selection:
        return joined_in_turn(F.normalize(tokens.hidden.float(), dim=1), super().select(tokens).kept)


def joined_in_turn(unit: torch.Tensor, kept: torch.Tensor) -> Selection:
    """The selection of `kept` (int64 `[K]`, ascending) rows of `unit` (`[n, D]`, of length 1), which the others join in turn.

    A token becomes the mean of itself and the next one that joins. So the last to join weighs a half, the one before a quarter.
    """
    count, device = len(unit), unit.device
    others = torch.ones(count, dtype=torch.bool, device=device).index_fill_(0, kept, False).nonzero()[:, 0]
    owner = torch.zeros(count, dtype=torch.int64, device=device)
    owner[kept], owner[others] = ascending(len(kept), device), closest(unit[others], unit[kept])[1]
    joining = torch.bincount(owner[others], minlength=len(kept))
    order = owner[others].argsort(stable=True)  # group by group, each in the order of its tokens
    starts = joining.cumsum(0) - joining
    turn = ascending(len(others), device) - starts[owner[others][order]]
    later = torch.empty(count, dtype=torch.float32, device=device)  # how many join after a token does, itself included
    later[kept] = joining.float()
    later[others[order]] = (joining[owner[others][order]] - turn).float()
    return Selection(kept, owner, torch.exp2(-later).clamp(min=LEAST))
