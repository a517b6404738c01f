"""CDPruner, which selects tokens with a determinantal point process conditioned on the question."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evoprune.contrib.shared import like_question, relevant
from evoprune.methods import Selection, Selector, Tokens, snap, spread

STEP = 1 / 16384
MAX_FEATURES = 1 << 23  # number of float64 values to hold in memory at a time


@dataclass(frozen=True)
class CdPruner(Selector):
    """CDPruner (arXiv 2506.10967): a determinantal point process within each frame pair, conditioned on the question.

    Tokens are selected greedily to maximize the determinant of the kernel cosine(i, j) * relevance(i) * relevance(j) over the kept
    tokens. With each token scaled to a length equal to its relevance, the next token is always the one with the largest component
    orthogonal to the tokens kept so far. Relevance is the mean cosine similarity to the question tokens, scaled to (0, 1].

    Differences from the paper: relevance is computed from the language model's embeddings, as in OpenVINO GenAI. The paper uses
    CLIP, and the authors' code uses the negative mean (see `negative`).
    """

    name = "cdpruner"
    source = "arXiv 2506.10967"

    # Whether to weight tokens by their relevance to the question; if False, only diversity matters.
    question: bool = True
    # Whether tokens that are dissimilar to the question count as relevant, as in the authors' code.
    negative: bool = False

    @property
    def reads_question(self) -> bool:
        return self.question

    def scores(self, tokens: Tokens) -> torch.Tensor:
        if not self.question:
            return torch.ones(len(tokens.unit_to_row), dtype=torch.float32, device=tokens.rows.device)
        return -like_question(tokens) if self.negative else like_question(tokens)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        weight = torch.stack([*map(relevant, tokens.by_pair(self.scores(tokens)))])
        unit = tokens.by_pair(tokens.normalised)
        counts = spread(keep, len(unit))
        at_once = max(1, MAX_FEATURES // unit[0].numel())
        kept = []
        for first in range(0, len(unit), at_once):
            part = slice(first, first + at_once)
            kept += widest(unit[part], weight[part], counts[part])
        return Selection.of_pairs(kept, unit.shape[1])


def widest(unit: torch.Tensor, weight: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """Greedily select the rows that span the largest weighted volume in each of T groups.

    Args:
        unit: `[T, n, D]`, unit-length rows.
        weight: `[T, n]`, the length to which each row is scaled.
        counts: The number of rows to select from each group. Each step selects one row from every group.

    Returns:
        For each group, the int64 indices of the selected rows, ascending.
    """
    vectors = unit.double() * weight.double()[:, :, None]
    factor = vectors.new_zeros(max(counts), *weight.shape)  # rows of the Cholesky factors, in selection order
    left = vectors.square().sum(2)  # squared length of each row's component orthogonal to the selected rows
    selected = torch.zeros_like(left, dtype=torch.bool)
    order = []
    for step in range(max(counts)):
        best = snap(left).masked_fill(selected, -torch.inf).argmax(1, keepdim=True)
        selected.scatter_(1, best, True)
        order.append(best)
        column = vectors.take_along_dim(best[:, :, None], 1).transpose(1, 2)
        # Components of the new row along the previously selected rows.
        known = factor[:step].take_along_dim(best[None], 2)
        beside = (vectors @ column)[:, :, 0] - (factor[:step] * known).sum(0)
        factor[step] = beside / left.take_along_dim(best, 1).clamp(min=STEP).sqrt()
        left = left - factor[step].square()
    order = torch.cat(order, 1)
    return [rows[:count].sort().values for rows, count in zip(order, counts, strict=True)]
