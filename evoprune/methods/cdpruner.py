"""CDPruner (arXiv 2506.10967): the tokens that span the greatest volume, each as long as it has to do with the question.

Faithful: a determinantal point process whose kernel is the cosine of two tokens times the relevance of both, relevance brought to
(0, 1] by its least and greatest value; greedily always the token that raises the determinant most, by a Cholesky factor that
grows. Adapted: the paper measures relevance with CLIP's text tower; Qwen has none, so it is the mean cosine to the embeddings of
the question's tokens in the language model's space, as in OpenVINO GenAI. An image of the paper is a grid here, and grids have
equal shares. Relevance is at least 1/128, and is 1 where it is the same everywhere. What is left of a token's length is rounded
so that equals are ties, which go by index; so do all tokens once those chosen span everything.
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
    """O(k n (D + k)) a grid of n tokens of which k are kept, memory O(N D + n k). Fields:

    question: whether relevance counts; without it the choice is diversity alone, and needs no question.
    """

    name: ClassVar[str] = "cdpruner"

    question: bool = True

    @property
    def reads_question(self) -> bool:
        return self.question

    def select(self, tokens: Tokens, keep: int) -> Selection:
        grids, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        unit = F.normalize(tokens.features.float(), dim=1)
        relevance = torch.ones(len(unit), device=unit.device)
        if self.question:
            relevance = snap((unit @ F.normalize(tokens.question, dim=1).T).mean(1))
        chosen = [
            widest(some, relevant(of_each), share) + grid * per_pair
            for grid, (some, of_each, share) in enumerate(
                zip(unit.split(per_pair), relevance.split(per_pair), spread(keep, grids), strict=True)
            )
        ]
        return Selection(torch.cat(chosen))


def relevant(relevance: torch.Tensor) -> torch.Tensor:
    """`[n]`, in (0, 1]."""
    flat = relevance.max() == relevance.min()
    return torch.where(flat, torch.ones_like(relevance), scaled(relevance).clamp(min=LEAST))


def widest(unit: torch.Tensor, weight: torch.Tensor, keep: int) -> torch.Tensor:
    """int64 `[keep]`, ascending: rows of `unit` (`[n, D]`, of length one or zero) that, times `weight` (`[n]`), span much."""
    vectors = unit.double() * weight.double()[:, None]
    factor = vectors.new_zeros(keep, len(unit))  # rows of the Cholesky factor, in the order of choice
    left = vectors.square().sum(1)  # of the length of each, squared, beside what is spanned
    chosen = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    for step in range(keep):
        best = snap(left).masked_fill(chosen, -torch.inf).argmax()
        chosen[best] = True
        beside = vectors @ vectors[best] - factor[:step].T @ factor[:step, best]
        factor[step] = beside / left[best].clamp(min=STEP).sqrt()
        left = left - factor[step].square()
    return chosen.nonzero().flatten()
