"""HoliTom, second stage: dropped tokens merge into kept ones."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import Part, closest, turns
from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, Selection, arange_on, one_drop


@dataclass(frozen=True)
class HoliTomInner(LanguageMethod):
    """HoliTom (arXiv 2505.21334), the stage inside the language model: FastV, with merging of the dropped tokens.

    After a share `depth` of the layers, the tokens stay that receive the most attention from the last token. The dropped tokens
    join the most similar kept token (cosine of hidden states), in turn: the kept token becomes the mean of itself and the next one
    to join.
    """

    name = "holitom-inner"
    source = "arXiv 2505.21334"
    default_share = 0.5

    depth: Part = 18 / 28

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)

    def select(self, tokens: LayerTokens) -> Selection:
        return joined_in_turn(F.normalize(tokens.hidden.float(), dim=1), super().select(tokens).kept)


def joined_in_turn(unit: torch.Tensor, kept: torch.Tensor) -> Selection:
    """Return the selection of `kept` rows that the other rows join in turn.

    A kept token becomes the mean of itself and the next token to join. So the last to join weighs a half, the one before a quarter.

    Args:
        unit: `[n, D]`, all rows, of length 1.
        kept: int64 `[K]`, ascending.
    """
    count = len(unit)
    device = unit.device
    others = torch.ones(count, dtype=torch.bool, device=device).index_fill_(0, kept, False).nonzero()[:, 0]
    unit_to_token = torch.zeros(count, dtype=torch.int64, device=device)
    to = closest(unit[others], unit[kept])[1]
    unit_to_token[kept], unit_to_token[others] = arange_on(len(kept), device), to
    joining = torch.bincount(to, minlength=len(kept))
    # how many tokens join from this one on, itself included
    later = torch.empty(count, dtype=torch.float32, device=device)
    later[kept], later[others] = joining.float(), (joining[to] - turns(arange_on(len(to), device), to)).float()
    # the smallest float32 with full precision
    return Selection(kept, unit_to_token, torch.exp2(-later).clamp(min=2.0**-126))
