"""EarlyTom, which merges whole frame pairs between layers of the vision encoder."""

from collections import deque
from dataclasses import dataclass
from math import prod
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import Share
from evoprune.methods import (
    EncoderMethod,
    Grid,
    Selection,
    Selector,
    Stage,
    Tokens,
    TowerShape,
    arange_on,
    highest,
    snap,
    spread,
)


@dataclass(frozen=True)
class Runs:
    """Divides a video into runs of consecutive frame pairs with little change."""

    # A run ends when the moving average of the similarity to the run's first frame pair falls below this.
    threshold: Annotated[float, "(-inf, inf)"] = 0.6
    window: Annotated[int, "[2, inf)"] = 8  # maximum length of a run, in frame pairs, exclusive
    momentum: Share = 0.9  # weight of the newest similarity in the moving average

    def of(self, like: list[list[float]]) -> list[range]:
        """Return the runs in order, as ranges of frame indices. `like` contains the similarities between nearby frames."""
        starts = [0]
        running = 1.0
        for frame in range(1, len(like)):
            running = self.momentum * like[starts[-1]][frame - starts[-1]] + (1 - self.momentum) * running
            if running < self.threshold or frame - starts[-1] + 1 >= self.window:
                starts.append(frame)
                running = 1.0
        return [range(first, last) for first, last in zip(starts, [*starts[1:], len(like)], strict=True)]

    def merged(self, like: list[list[float]]) -> tuple[list[int], list[float]]:
        """Decide which frames to merge.

        Returns:
            For each frame, the index of the frame that it merges into (its own index if it is kept), and its weight in the mean.
        """
        into = list(range(len(like)))
        weight = [1.0] * len(like)
        for run in self.of(like):
            inner = run[1:-1]
            if len(inner) < 2:
                continue
            ends = like[run[0]][len(run) - 1]
            at = inner[0]
            while at < inner[-1]:
                now = like[at][1]
                after = like[at + 1][1] if at + 1 < inner[-1] else 0.0
                if now > ends and now > after:
                    into[at + 1] = at
                    weight[at] = now / (now + max(0.0, after)) if now > 0 else 1.0
                    weight[at + 1] = 1 - weight[at]
                    at += 1
                at += 1
            if at == inner[-1]:
                into[at], weight[at] = into[at - 1], 0.0
        return into, weight


@dataclass(frozen=True)
class MergedFrames(Runs, Selector):
    """Merges frame pairs between two layers in O(window N D) time. The number of remaining frame pairs depends on the content."""

    source = "arXiv 2605.30010"
    exact = False
    needs = frozenset({"hidden"})

    def select(self, tokens: Tokens, keep: int) -> Selection:
        frame, first = frames_of(tokens)
        places = arange_on(tokens.unit_to_row.numel() // len(frame), frame.device)
        into, weight = self.merged(similarities(tokens.rows.view(len(first), len(places), -1), self.window))
        into = torch.tensor(into, dtype=torch.int64, device=frame.device)
        weight = torch.tensor(weight, dtype=torch.float32, device=frame.device)
        stays = into == arange_on(len(into), into.device)
        unit_to_token = (stays.cumsum(0) - 1)[into[frame]]
        own = first[frame] == arange_on(len(frame), frame.device)  # all other frame pairs have already been merged
        return Selection(
            (first[stays][:, None] * len(places) + places).flatten(),
            (unit_to_token[:, None] * len(places) + places).flatten(),
            torch.where(own, weight[frame], 0).repeat_interleave(len(places)),
        )


@dataclass(frozen=True)
class FrameTokens(Runs, Selector):
    """Selects tokens for the language model from merged frame pairs, in O(window N D) time."""

    source = "arXiv 2605.30010"
    needs = frozenset({"attention"})

    def select(self, tokens: Tokens, keep: int) -> Selection:
        first = frames_of(tokens)[1]
        attention = snap(tokens.given["attention"]).view(len(first), -1)
        frames, places = attention.shape
        runs = self.of(similarities(tokens.rows.view(frames, places, -1), self.window))
        ends = {end for run in runs for end in (run[0], run[-1])}
        selected = []
        for number, share in enumerate(spread(min(keep, attention.numel()), frames)):
            best = highest if number in ends else highest_of_stretches
            selected.append(best(attention[number], share) + first[number] * places)
        if keep > attention.numel():
            merged = torch.ones(len(tokens.unit_to_row), dtype=torch.bool, device=attention.device)
            merged[torch.cat(selected)] = False
            units = merged.nonzero().flatten()
            more = highest(snap(tokens.attention)[units], keep - attention.numel())
            selected.append(units[more])
        return Selection(torch.cat(selected).sort().values)


@dataclass(frozen=True)
class EarlyTom(Runs, EncoderMethod):
    """EarlyTom (arXiv 2605.30010): merges whole frame pairs after three layers. Each merge takes O(window N D) time.

    Runs of similar frame pairs (`Runs`) are shortened three times, after the fractions `first`, `second`, and `third` of the
    layers. The first and last frame pairs of a run are always kept. Between them, two neighboring frame pairs merge if they are
    more similar to each other than the two ends of the run and also more similar than the following two neighbors. The remaining
    frame pairs share the budget evenly. The frame pairs at the ends of a run keep their most attended tokens. All other frame pairs
    are divided into stretches of neighboring tokens and keep the most attended token in each stretch.

    Differences from the paper: the settings come from the authors' code for LLaVA-OneVision, so they were tuned for SigLIP. Density
    peaks (disabled by default in the authors' code) and merging inside the language model are not implemented.
    """

    name = "earlytom"
    source = "arXiv 2605.30010"

    first: Share = 7 / 26  # fraction of the tower's layers that run before frame pairs are first merged
    second: Share = 22 / 26
    third: Share = 24 / 26

    @property
    def tokens(self) -> FrameTokens:
        return FrameTokens(self.threshold, self.window, self.momentum)

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        latest = max(tower.full_layers, default=tower.depth - 1)
        after = {min(max(1, round(share * tower.depth)), latest) for share in (self.first, self.second, self.third)}
        merge = MergedFrames(self.threshold, self.window, self.momentum)
        return [Stage(layer, prod(grid), merge, exact=False, whole_pairs=True) for layer in sorted(after - {0})]


def frames_of(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Map frame pairs to the F merged frames that represent them.

    Returns:
        int64 `[T]`, the merged frame for each frame pair, and int64 `[F]`, the first frame pair of each merged frame.
    """
    places = tokens.grid[1] * tokens.grid[2]
    frame = tokens.unit_to_row.view(tokens.grid[0], places)[:, 0] // places
    first = torch.searchsorted(frame, arange_on(len(tokens.rows) // places, frame.device))
    return frame, first


def similarities(x: torch.Tensor, window: int) -> list[list[float]]:
    """Compute the similarities between nearby frames.

    Args:
        x: `[F, n, D]`, the tokens of F frames.
        window: The maximum number of similarities per frame, including its similarity to itself.

    Returns:
        Nested lists. Entry `[i][d]` is the mean cosine similarity between the tokens of frames i and i + d, for d < `window`.
    """
    held = deque(maxlen=window)
    cosines = []
    for frame in x:
        held.append(F.normalize(frame.float(), dim=1))
        cosines.append(torch.stack([(held[-1] * other).sum(1).mean() for other in reversed(held)]))
    sizes = [len(row) for row in cosines]
    # For each frame, the similarities to itself and to the preceding frames.
    back = [row.tolist() for row in snap(torch.cat(cosines)).cpu().split(sizes)]
    return [[back[i + d][d] for d in range(min(window, len(x) - i))] for i in range(len(x))]


def highest_of_stretches(score: torch.Tensor, count: int) -> torch.Tensor:
    """Divide scores into consecutive stretches and return the index of the highest score in each stretch: int64 `[count]`.

    If the n scores cannot be divided evenly, the first stretches contain one more score than the others.
    """
    if not count:
        return arange_on(0, score.device)
    length, longer = divmod(len(score), count)
    number = arange_on(count, score.device)
    start = number * length + number.clamp(max=longer)
    index = start[:, None] + arange_on(length + 1, score.device)
    inside = arange_on(length + 1, score.device) < (length + (number < longer))[:, None]
    values = score[index.clamp(max=len(score) - 1)].masked_fill(~inside, -torch.inf)
    return start + values.argmax(1)
