"""The SparseVLM method, which lets text tokens rate the visual tokens and merges some of the dropped tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evoprune.contrib.shared import BLOCK, gathered, joined_peaks, ranked, relative
from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, Selection, arange_on, several_drops

# The number of tokens, out of 576, left after each drop. The first and last rows are the extremes: no tokens and all tokens. The
# other rows are the authors' counts for averages of 64, 96, 128, and 192 tokens.
COUNTS = ((0, 0, 0), (66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110), (576, 576, 576))


@dataclass(frozen=True)
class SparseVlm(LanguageMethod):
    """SparseVLM (arXiv 2410.04417, section 3): text tokens rate the visual tokens, and some of the dropped tokens merge.

    The raters are the text tokens that receive above-average attention from visual tokens, computed on embeddings. After 3, 7, and
    16 of 32 layers, the method keeps the visual tokens that receive the most attention from the raters. The best 30% of the dropped
    tokens merge around density peaks into one tenth as many means.

    Differences from the authors' code: the authors provide counts for four budgets, and this method interpolates between them
    (`COUNTS`). Here, the means are part of the budget and take the positions of their peaks. In the authors' code, they are added
    on top of the budget and placed after all other tokens.
    """

    name = "sparsevlm"
    source = "arXiv 2410.04417, section 3"
    default_share = (4 * 300 + 9 * 200 + 16 * 110) / (29 * 576)  # from the authors' counts for a mean of 192 tokens

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        def shares(place: float) -> Sequence[float]:
            row = min(int(place * (len(COUNTS) - 1)), len(COUNTS) - 2)
            part = place * (len(COUNTS) - 1) - row
            return [(low + part * (high - low)) / 576 for low, high in zip(*COUNTS[row : row + 2], strict=True)]

        return several_drops(depth, tokens, (3 / 32, 7 / 32, 16 / 32), shares, budget)

    def select(self, tokens: LayerTokens) -> Selection:
        if "raters" not in tokens.memory:
            tokens.memory["raters"] = _raters(tokens.visual_embeds, tokens.text_embeds)
        score = relative(tokens.attention(tokens.memory["raters"]))
        count = len(tokens.visual)
        stay = selected(count, tokens.left)
        order = ranked(score)
        into = torch.full_like(order, -1)
        into[order[:stay]] = order[:stay]
        if means := tokens.left - stay:
            merging = order[stay : stay + recycled(count - stay)].sort().values
            into[merging] = merging[joined_peaks(tokens.hidden[merging], means, means)]
        return gathered(into)


def _raters(visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Choose the text tokens that rate the visual tokens, given the visual (`[N, D]`) and text (`[Q, D]`) embeddings.

    Returns:
        int64 `[q]`, indices into `text`.
    """
    words = text.float().T
    weight = sum((block.float() @ words).softmax(1).sum(0) for block in visual.split(BLOCK))
    raters = (weight > weight.mean()).nonzero()[:, 0]
    return raters if len(raters) else arange_on(len(text), text.device)


def recycled(dropped: int) -> int:
    """Return the number of dropped tokens to merge instead of discarding them."""
    return int(dropped * 0.3) + 1


def selected(count: int, left: int) -> int:
    """Return how many of `count` tokens to keep unmerged so that at most `left` tokens remain, including the means.

    Returns `left` if there is no such number.
    """
    for stay in range(left - 1, 0, -1):
        if stay + recycled(count - stay) // 10 + 1 <= left:
            return stay
    return left
