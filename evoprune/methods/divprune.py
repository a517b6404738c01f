"""DivPrune (arXiv 2503.02175): the most diverse tokens, chosen one after another, each farthest from those there are.

Faithful: distance 1 - cosine of the tokens that the language model would read; first the token whose nearest neighbour is
farthest, then always the one whose nearest chosen token is farthest. Adapted: written from the paper for a whole video at once,
with a running maximum of the cosine to what is chosen, so that no N x N matrix is ever held; what is chosen cannot be chosen
again, even if it equals another; cosines are rounded (`score.snap`) so that equals are ties, which go by index.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.ranking import BLOCK
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class DivPrune(Selector):
    """O(N^2 D) for the first token, O(K N D) for the others; memory O(N D)."""

    name: ClassVar[str] = "divprune"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(most_diverse(tokens.features, keep))


def most_diverse(features: torch.Tensor, keep: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The indices of `keep` rows of `features` (`[N, D]`), ascending: greedy max-min distance. Ties go by index.

    `weight`: `[N]`, at least 0, by which the distance of a row to those chosen is multiplied; None for none.
    """
    unit = F.normalize(features.float(), dim=1)
    chosen = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)

    def farthest(near: torch.Tensor) -> torch.Tensor:
        far = 1 - near.clamp(min=-1)
        return (far if weight is None else snap(far * weight)).masked_fill(chosen, -torch.inf).argmax()

    near = torch.full((len(unit),), -torch.inf, device=unit.device)
    for step in range(keep):
        latest = farthest(near if step else nearest_cosine(unit))[None]
        chosen.index_fill_(0, latest, True)  # an index in brackets would make the host wait for a GPU
        near = torch.maximum(near, snap(unit @ unit.index_select(0, latest)[0]))
    return chosen.nonzero().flatten()


def nearest_cosine(unit: torch.Tensor) -> torch.Tensor:
    """The cosine of each row to the most similar other one, -inf if there is none; `unit`: `[N, D]`, rows of length one."""
    best = []
    for start in range(0, len(unit), BLOCK):
        cosine = snap(unit[start : start + BLOCK] @ unit.T)
        itself = torch.arange(len(cosine), device=unit.device)
        cosine[itself, itself + start] = -torch.inf
        best.append(cosine.amax(1))
    return torch.cat(best)
