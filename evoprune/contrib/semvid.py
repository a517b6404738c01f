"""SemVID, which keeps tokens that resemble the question's words, tokens that move, and one typical token per frame pair."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.backend import greedy_cosine
from evoprune.contrib.shared import Cosine, Count, Share, apportion, ranked, segments, transitions
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap

WORDS = 50  # a question with more tokens is represented by their mean


@dataclass(frozen=True)
class SemVid(Selector):
    """SemVID (arXiv 2603.05663), made for finding moments: object tokens, motion tokens, and context tokens.

    Every frame pair keeps the token closest to its mean. The other tokens go to the `segments` segments that are most relevant to
    the question, and within a segment to the frame pairs with the highest `alpha` * relevance + (1 - `alpha`) * change since the
    previous frame pair. A frame pair's relevance is the mean of its two highest cosine similarities to a question token.

    A share `objects` of a frame pair's other tokens are selected by maximal marginal relevance (`lam`) to the question's tokens.
    Each question token selects in turn, in proportion to its similarity to the most similar visual token. The rest are the tokens
    that change the most over time, with `beta` as the weight of their similarity to the question.

    Differences from the authors' code: if there are fewer tokens than frame pairs, not every frame pair keeps one, whereas the
    authors exceed the budget. Tokens that exceed a frame pair's size go to the other frame pairs of its segment first.
    """

    name = "semvid"
    source = "arXiv 2603.05663"
    reads_question = True

    alpha: Share = 0.7
    objects: Share = 0.6
    lam: Share = 0.9
    beta: Share = 0.5
    segments: Count = 2
    threshold: Cosine = 0.9  # segments are cut between frame pairs whose mean tokens have a lower cosine similarity

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.by_pair(tokens.features.float())
        unit = F.normalize(x, dim=2, eps=1e-6)
        mean = F.normalize(x.mean(1), dim=1, eps=1e-6)
        words = F.normalize(tokens.question, dim=1, eps=1e-6)
        single = len(words) > WORDS
        if single:
            words = F.normalize(tokens.question.mean(0, keepdim=True), dim=1, eps=1e-6)
        counts = self._counts(tokens, mean, words, keep)
        moving = motion(x)
        kept = []
        for pair, count in enumerate(counts):
            like = snap(unit[pair] @ words.T)
            context = int(snap(unit[pair] @ mean[pair]).argmax())
            blend = 0.0 if single else self.beta
            kept.append(self._of_pair(unit[pair], like, moving[pair], context, count, blend))
        return Selection.of_pairs(kept, x.shape[1])

    def _counts(self, tokens: Tokens, mean: torch.Tensor, words: torch.Tensor, keep: int) -> list[int]:
        """Return the number of tokens that each frame pair keeps.

        Args:
            mean: `[T, D]`, the mean tokens, scaled to unit length.
            words: `[Q, D]`, the question's tokens, scaled to unit length.
        """
        pairs, per_pair = len(mean), tokens.grid[1] * tokens.grid[2]
        relevance = snap((mean @ words.T).topk(min(2, len(words)), dim=1).values.mean(1))
        change = torch.zeros_like(relevance)
        if pairs > 1:
            change[1:] = snap(mean.diff(dim=0).norm(dim=1))
            change[0] = change[1]
        spans = segments(transitions(tokens), 1, self.threshold)
        scores = torch.stack([relevance[span.start : span.stop].mean() for span in spans])
        weights = scores.relu()
        if not weights.any():
            weights = scores - scores.min() + 1e-6
        best = ranked(snap(weights))[: self.segments]
        weights = torch.zeros_like(weights).index_copy_(0, best, weights[best])
        least = min(1, keep // pairs)
        room = per_pair - least
        shares = apportion(keep - least * pairs, weights.tolist(), [room * len(span) for span in spans])
        frame_weights = (self.alpha * relevance.relu() + (1 - self.alpha) * change).tolist()
        counts = []
        for span, share in zip(spans, shares, strict=True):
            extra = apportion(share, frame_weights[span.start : span.stop], [room] * len(span))
            counts += [least + count for count in extra]
        return counts

    def _of_pair(
        self, unit: torch.Tensor, like: torch.Tensor, moving: torch.Tensor, context: int, count: int, blend: float
    ) -> torch.Tensor:
        """Select the tokens of a frame pair: int64 `[count]`, ascending.

        Args:
            unit: `[n, D]`, the tokens, scaled to unit length.
            like: `[n, Q]`, their cosine similarities to the question's tokens.
            moving: `[n]`, how much they change over time.
            context: The token closest to the frame pair's mean, which is selected first.
            blend: The weight of the similarity to the question among motion tokens.
        """
        selected = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
        if not count:
            return selected.nonzero().flatten()
        selected[context] = True
        objects = round((count - 1) * self.objects)
        weight = like.amax(0).relu()
        shares = apportion(objects, weight.tolist(), [objects] * len(weight))
        for word in ranked(weight).tolist():
            if shares[word]:
                others = (~selected).nonzero().flatten()
                bonus = self.lam * like[others, word]
                selected[others[greedy_cosine(unit[others], None, bonus, 1 - self.lam, shares[word], False)]] = True
        others = (~selected).nonzero().flatten()
        left = count - int(selected.sum())
        if left:
            near = like.amax(1).relu()[others]
            score = (1 - blend) * portion(moving[others]) + blend * portion(near)
            selected[others[ranked(snap(score))[:left]]] = True
        return arange_on(len(unit), unit.device)[selected]


def motion(x: torch.Tensor) -> torch.Tensor:
    """Return how much each token differs from the same position in the neighboring frame pairs, on average.

    Args:
        x: `[T, n, D]`, the tokens.

    Returns:
        `[T, n]`, all zeros if there is only one frame pair.
    """
    change = x.diff(dim=0).norm(dim=2)
    if not len(change):
        return x.new_zeros(x.shape[:2])
    return (torch.cat([change[:1], change]) + torch.cat([change, change[-1:]])) / 2


def portion(values: torch.Tensor) -> torch.Tensor:
    """Divide nonnegative `values` by their maximum."""
    return values / values.max().clamp(min=1e-6)
