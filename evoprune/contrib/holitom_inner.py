"""HoliTom's second stage, which merges dropped tokens into kept tokens inside the language model."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import Part, closest, turns
from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, Selection, arange_on, one_drop


@dataclass(frozen=True)
class HoliTomInner(LanguageMethod):
    """HoliTom's second stage (arXiv 2505.21334), inside the language model: like FastV, but merges dropped tokens into kept tokens.

    After the first `depth` fraction of the layers, the method keeps the tokens that receive the most attention from the last token.
    Each dropped token merges into the kept token with the most similar hidden state (by cosine). If several tokens merge into the
    same kept token, they merge one after another, and each merge replaces the kept token with the mean of the two.
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
    """Return a selection in which dropped rows merge, one after another, into their closest kept row.

    Each merge replaces the kept row with the mean of itself and the new row. Therefore, the last merged row has a weight of one
    half in the result, the row before it a weight of one quarter, and so on.

    Args:
        unit: `[n, D]`, all rows, scaled to unit length.
        kept: int64 `[K]`, the kept rows, ascending.
    """
    count = len(unit)
    device = unit.device
    others = torch.ones(count, dtype=torch.bool, device=device).index_fill_(0, kept, False).nonzero()[:, 0]
    unit_to_token = torch.zeros(count, dtype=torch.int64, device=device)
    to = closest(unit[others], unit[kept])[1]
    unit_to_token[kept], unit_to_token[others] = arange_on(len(kept), device), to
    joining = torch.bincount(to, minlength=len(kept))
    # For each token, the number of tokens that join the same kept token, counting from this token on.
    later = torch.empty(count, dtype=torch.float32, device=device)
    later[kept], later[others] = joining.float(), (joining[to] - turns(arange_on(len(to), device), to)).float()
    # Weights are clamped to 2^-126, the smallest float32 with full precision.
    return Selection(kept, unit_to_token, torch.exp2(-later).clamp(min=2.0**-126))
