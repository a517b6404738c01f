"""HoliTom's first stage, which cuts the video into segments so that temporal merging removes as many tokens as possible."""

from dataclasses import dataclass
from typing import Annotated

import torch

from evoprune.contrib.shared import Cosine, apportion, averaged, gathered, join_groups
from evoprune.methods import Selection, Selector, Tokens, arange_on, highest, snap


@dataclass(frozen=True)
class HoliTom(Selector):
    """HoliTom's first stage (arXiv 2505.21334), before the language model: merges tokens over time in segments of the video.

    A position is static between two frame pairs if the cosine similarity of its two tokens is above `static`. Dynamic programming
    finds the segmentation that saves the most tokens, where a segment of L frame pairs saves L - 1 tokens for each position that is
    static throughout the segment. If averaging static positions over time saves enough tokens, positions are averaged until the
    budget is met, starting with the most static one. Otherwise, all static positions are averaged, moving tokens are then selected
    by attention, and static tokens merge around density peaks. A peak has a weight of at least `centre` in its mean.

    Differences from the authors' code: because Qwen's vision tower has no class token, this method replaces the class token's
    attention with the attention that a token receives within its frame pair. The authors' code rounds token counts up per frame
    pair.
    """

    name = "holitom"
    source = "arXiv 2505.21334, the stage before the language model"
    needs = frozenset({"attention"})

    # A position is static if the cosine similarity of its tokens in neighboring frame pairs is above this.
    static: Cosine = 0.8
    centre: Annotated[float, "(0, 1]"] = 0.6  # minimum weight of a peak in its mean

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.by_pair(tokens.features.float())
        index = tokens.by_pair(arange_on(len(tokens.unit_to_row), x.device))
        cosine = snap(torch.cosine_similarity(x[1:], x[:-1], dim=2))
        spans = most_saving(cosine > self.static)
        alone = torch.full(x.shape[1:2], -torch.inf, dtype=torch.float32, device=x.device)
        min_cosines = [cosine[span.start : span.stop - 1].amin(0) if len(span) > 1 else alone for span in spans]
        into = averaged(index, spans, min_cosines, self.static, keep)
        if into is not None:
            return gathered(into.flatten())
        attention = snap(tokens.attention)
        into = torch.full_like(tokens.unit_to_row, -1)
        still = [lowest > self.static for lowest in min_cosines]
        # `groups` contains the units at static positions, with one row per position, and `moving` the other units of each frame
        # pair.
        groups = [index[span.start : span.stop, places].T for span, places in zip(spans, still, strict=True)]
        moving = [index[pair, ~places] for span, places in zip(spans, still, strict=True) for pair in span]
        sizes = [len(group) for group in (*groups, *moving)]
        counts = apportion(keep, sizes, sizes)
        for units, count in zip(moving, counts[len(groups) :], strict=True):
            best = units[highest(attention[units], count)]
            into[best] = best
        return join_groups(into, x.flatten(0, 1), groups, counts[: len(groups)], self.centre)


def most_saving(same: torch.Tensor) -> list[range]:
    """Find the segments that save the most tokens using dynamic programming.

    A segment of L frame pairs saves L - 1 tokens for each position that does not change within the segment.

    Args:
        same: bool `[T - 1, n]`, whether each token is similar to the token at the same position in the next frame pair.
    """
    back = torch.zeros(same.shape[1], dtype=torch.int64, device=same.device)
    backs = []
    for unchanged in same:  # `back` is the number of steps over which each position has not changed
        back = (back + 1) * unchanged
        backs.append(torch.bincount(back, minlength=len(same) + 1))
    # still[t][n] is the number of positions that have not changed in the last n steps up to frame pair t + 1.
    still = torch.stack(backs).flip(1).cumsum(1).flip(1).tolist() if backs else []
    # best[t] is the number of tokens saved in the first t frame pairs, and start[t] is the start of their last segment.
    best = [0, 0]
    start = [0, 0]
    for last in range(1, len(same) + 1):
        # The last segment has length + 1 frame pairs. If several lengths save the same number of tokens, the shortest is used.
        saves = [best[last - length] + length * (length and still[last - 1][length]) for length in range(last + 1)]
        best.append(max(saves))
        start.append(last - saves.index(best[-1]))
    spans = []
    stop = len(same) + 1
    while stop:
        spans.append(range(start[stop], stop))
        stop = start[stop]
    return spans[::-1]
