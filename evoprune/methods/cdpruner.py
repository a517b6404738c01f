"""CDPruner (arXiv 2506.10967): tokens that span a great volume together, each weighted by its relevance to the question.

As in the paper: a determinantal point process, whose kernel is the cosine of two tokens times the relevance of both.
Relevance is scaled to (0, 1] by its least and greatest value. Each step selects the token that raises the determinant
most, by a growing Cholesky factor.
Adapted: the paper measures relevance with CLIP's text tower. Qwen has none, so relevance is the mean cosine to the
embeddings of the question's tokens in the language model's space, as in OpenVINO GenAI. The authors' code
(Theia-4869/CDPruner) takes the negative mean, which OpenVINO GenAI explains with CLIP: its similarities run against
intuition. Nothing of the kind is known of a language model's own space, so the positive mean is the default here, as it
is there; `negative` is the authors' choice. An image of the paper is a frame pair here, and all frame pairs have equal
shares. Relevance is at least 1/128, and 1 where it is the same everywhere. Remaining lengths are rounded, so equal
tokens are ties, which go by index; so do all tokens once the selected ones span everything.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import spread
from evoprune.pruning.ranking import scaled
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens

LEAST, STEP = 1 / 128, 1 / 16384


@dataclass(frozen=True)
class CdPruner(Selector):
    """O(k n (D + k)) for a frame pair of n tokens of which k are kept, memory O(N D + n k). Fields:

    question: whether relevance counts; without it diversity alone decides, and the method does not read the question.
    negative: whether tokens unlike the question are the relevant ones, as in the authors' code.
    """

    name: ClassVar[str] = "cdpruner"
    source: ClassVar[str] = "arXiv 2506.10967"

    question: bool = True
    negative: bool = False

    @property
    def reads_question(self) -> bool:
        return self.question

    def scores(self, tokens: Tokens) -> torch.Tensor:
        unit = F.normalize(tokens.features.float(), dim=1)
        if not self.question:
            return torch.ones(len(unit), dtype=torch.float32, device=unit.device)
        relevance = snap((unit @ F.normalize(tokens.question, dim=1).T).mean(1))
        return -relevance if self.negative else relevance

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        unit = F.normalize(tokens.features.float(), dim=1)
        selected = [
            widest(some, relevant(of_each), share) + pair * per_pair
            for pair, (some, of_each, share) in enumerate(
                zip(unit.split(per_pair), self.scores(tokens).split(per_pair), spread(keep, pairs), strict=True)
            )
        ]
        return Selection(torch.cat(selected))


def relevant(relevance: torch.Tensor) -> torch.Tensor:
    """Relevance `[n]` scaled to (0, 1]."""
    flat = relevance.max() == relevance.min()
    return torch.where(flat, torch.ones_like(relevance), scaled(relevance).clamp(min=LEAST))


def widest(unit: torch.Tensor, weight: torch.Tensor, keep: int) -> torch.Tensor:
    """Selects rows greedily by the volume that the weighted rows span.

    Args:
        unit: `[n, D]`, rows of length one or zero.
        weight: `[n]`, the factor of each row.

    Returns:
        int64 `[keep]`, indices of rows, ascending.
    """
    vectors = unit.double() * weight.double()[:, None]
    factor = vectors.new_zeros(keep, len(unit))  # rows of the Cholesky factor, in the order of selection
    left = vectors.square().sum(1)  # squared length of each row outside the span of the selected ones
    selected = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    for step in range(keep):
        best = snap(left).masked_fill(selected, -torch.inf).argmax()
        selected[best] = True
        beside = vectors @ vectors[best] - factor[:step].T @ factor[:step, best]
        factor[step] = beside / left[best].clamp(min=STEP).sqrt()
        left = left - factor[step].square()
    return selected.nonzero().flatten()
