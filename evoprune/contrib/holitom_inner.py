"""HoliTom's second stage: merges dropped tokens into kept tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import Part, closest, turns
from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, Selection, arange_on, one_drop


@dataclass(frozen=True)
class HoliTomInner(LanguageMethod):
    """HoliTom's second stage (arXiv 2505.21334), inside the language model: FastV that merges dropped tokens into kept ones.

    After a share `depth` of the layers, the method keeps the tokens that receive the most attention from the last token. Each
    dropped token joins the most similar kept token, measured by the cosine of hidden states. Tokens join one after another: each
    time, the kept token is replaced by the mean of itself and the joining token.
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
    """Return a selection of `kept` rows in which all other rows join their closest kept row, one after another.

    Each time, the kept row is replaced by the mean of itself and the joining row. The last row to join therefore has a weight of
    one half, and the row before it has a weight of one quarter.

    Args:
        unit: `[n, D]`, all rows, of unit length.
        kept: int64 `[K]`, ascending.
    """
    count = len(unit)
    device = unit.device
    others = torch.ones(count, dtype=torch.bool, device=device).index_fill_(0, kept, False).nonzero()[:, 0]
    unit_to_token = torch.zeros(count, dtype=torch.int64, device=device)
    to = closest(unit[others], unit[kept])[1]
    unit_to_token[kept], unit_to_token[others] = arange_on(len(kept), device), to
    joining = torch.bincount(to, minlength=len(kept))
    # The number of tokens that join from this token on, including itself.
    later = torch.empty(count, dtype=torch.float32, device=device)
    later[kept], later[others] = joining.float(), (joining[to] - turns(arange_on(len(to), device), to)).float()
    # Weights are at least 2^-126, the smallest float32 with full precision.
    return Selection(kept, unit_to_token, torch.exp2(-later).clamp(min=2.0**-126))
