"""CDPruner (arXiv 2506.10967): tokens that span a great volume together, each weighted by its relevance to the question."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import spread
from evoprune.pruning.ranking import of_pairs, scaled, snap
from evoprune.pruning.types import Selection, Tokens

LEAST, STEP = 1 / 128, 1 / 16384


@dataclass(frozen=True)
class CdPruner(Selector):
    name = "cdpruner"
    source = "arXiv 2506.10967"

    question: bool = True  # whether relevance counts; otherwise diversity alone decides
    negative: bool = False  # whether tokens unlike the question are relevant, as in the authors' code

    @property
    def reads_question(self) -> bool:
        return self.question

    def scores(self, tokens: Tokens) -> torch.Tensor:
        if not self.question:
            return torch.ones(len(tokens.owner), dtype=torch.float32, device=tokens.rows.device)
        return -like_question(tokens) if self.negative else like_question(tokens)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        unit, weight = tokens.by_pair(tokens.normalised), map(relevant, tokens.by_pair(self.scores(tokens)))
        return of_pairs(map(widest, unit, weight, spread(keep, len(unit))), unit.shape[1])


def like_question(tokens: Tokens) -> torch.Tensor:
    """float32 `[N]`: the mean cosine of each token to the tokens of the question, rounded so that equal tokens are ties."""
    return snap((tokens.normalised @ F.normalize(tokens.question, dim=1).T).mean(1))


def relevant(relevance: torch.Tensor) -> torch.Tensor:
    """Relevance `[n]` scaled to (0, 1]."""
    flat = relevance.max() == relevance.min()
    return torch.where(flat, torch.ones_like(relevance), scaled(relevance).clamp(min=LEAST))


def widest(unit: torch.Tensor, weight: torch.Tensor, keep: int) -> torch.Tensor:
    """int64 `[keep]`, ascending: rows of `unit` (`[n, D]`) whose volume, times `weight` (`[n]`) each, is greatest; greedily."""
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
