"""DivPrune (arXiv 2503.02175): the most diverse tokens, by greedy max-min distance.

As in the paper: the distance of two tokens is 1 - cosine of the features that the language model would read. The first
token is the one whose nearest neighbour is farthest. Each further token is the one whose nearest selected token is
farthest.
Adapted: one selection covers the whole video. A running maximum of the cosines to selected tokens replaces the N x N
matrix. A token cannot be selected twice, even if it equals another. Cosines are rounded (`score.snap`), so equal tokens
are ties, which go by index.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import BLOCK
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class DivPrune(Selector):
    """O(N^2 D) for the first token, O(K N D) for the others; memory O(N D). No fields."""

    name: ClassVar[str] = "divprune"
    source: ClassVar[str] = "arXiv 2503.02175"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(most_diverse(tokens.features, keep))


def most_diverse(features: torch.Tensor, keep: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Selects rows by greedy max-min distance; ties go to the lower index.

    Args:
        features: `[N, D]`, any float dtype.
        keep: K, from 1 to N.
        weight: float `[N]`, at least 0; multiplies the distance of a row to the selected rows. None for 1.

    Returns:
        int64 `[K]`, indices of rows, ascending.
    """
    unit = F.normalize(features.float(), dim=1)
    selected = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)

    def farthest(near: torch.Tensor) -> torch.Tensor:
        far = 1 - near.clamp(min=-1)
        return (far if weight is None else snap(far * weight)).masked_fill(selected, -torch.inf).argmax()

    near = torch.full((len(unit),), -torch.inf, dtype=torch.float32, device=unit.device)
    for step in range(keep):
        latest = farthest(near if step else nearest_cosine(unit))[None]
        selected.index_fill_(0, latest, True)  # an index in brackets would make the program wait for a GPU
        near = torch.maximum(near, snap(unit @ unit.index_select(0, latest)[0]))
    return selected.nonzero().flatten()


def nearest_cosine(unit: torch.Tensor) -> torch.Tensor:
    """float32 `[N]`: the cosine of each row of `unit` (`[N, D]`, of length one) to the most similar other row, -inf if none."""
    best = []
    for start in range(0, len(unit), BLOCK):
        cosine = snap(unit[start : start + BLOCK] @ unit.T)
        itself = ascending(len(cosine), unit.device)
        cosine[itself, itself + start] = -torch.inf
        best.append(cosine.amax(1))
    return torch.cat(best)
