"""Into which segments a video is cut, and which of them are moments: numbers only, no files and no model.

A segment's score is a probability. Here it is the log of its odds, in which a border between two groups of scores can be seen.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

SEGMENT_S = 8.0  # length of a segment where nothing asks for another
LEAST_PAIRS = 4  # frame pairs of a segment whose length and rate nobody has given
# What is shown stands out so many deviations above the median of all segments' log odds. These numbers were chosen on validation
# clips of both demo models, which answer no with 4 to 7 in most segments.
DEVIATIONS = 4.0
NORMAL_DEVIATION = 1.4826  # of a normal distribution, over its median absolute deviation
LEAST_SCORE = 0.96  # a lower one is no moment, however much it stands out
SURE_SCORE = 0.98  # a higher one is a moment, however common it is: the video may show it most of the time
MARGIN = 2.2  # segments whose log odds are so much too low are looked at in pieces, too, which may raise their score


@dataclass(frozen=True)
class Segment:
    """Hold a part of a video, in seconds, and how many frames of it are looked at."""

    start_s: float
    end_s: float
    frames: int

    @property
    def middle_s(self) -> float:
        return (self.start_s + self.end_s) / 2


@dataclass(frozen=True)
class Run:
    """Hold segments that follow one another and show the same thing: the places of the first, the best and the last."""

    first: int
    best: int
    last: int


def cut(
    start_s: float, end_s: float, fps: float, pair_tokens: int, total_tokens: int | None, segment_s: float | None
) -> list[Segment]:
    """Cut a span of a video into equal segments.

    Args:
        fps: frames a second, at most.
        pair_tokens: visual tokens of a frame pair.
        total_tokens: of all segments together; None for as many as `fps` makes. A lower rate keeps to it. Each segment has at
            least one frame pair.
        segment_s: the length, at most; default: `SEGMENT_S`, or longer, so that a segment has `LEAST_PAIRS`.
    """
    length_s = end_s - start_s
    count = max(1, math.ceil(length_s / (segment_s or SEGMENT_S) - 1e-6))
    if total_tokens is not None:
        pairs = max(1, total_tokens // pair_tokens)
        fps = min(fps, 2 * pairs / length_s)
        if segment_s is None:
            count = min(count, max(1, pairs // LEAST_PAIRS))
    step_s = length_s / count
    frames = max(2, 2 * math.floor(step_s * fps / 2 + 1e-6))
    borders = [start_s + number * step_s for number in range(count)] + [end_s]
    return [Segment(borders[number], borders[number + 1], frames) for number in range(count)]


def log_odds(probability: float) -> float:
    """Return the log of the odds of a probability; infinite for 0 and 1."""
    if probability <= 0:
        return -math.inf
    if probability >= 1:
        return math.inf
    return math.log(probability / (1 - probability))


def probability(odds: float) -> float:
    """Return the probability of which this is the log of the odds."""
    if odds < 0:
        return math.exp(odds) / (1 + math.exp(odds))
    return 1 / (1 + math.exp(-odds))


def least_odds(scores: Sequence[float]) -> float:
    """Return the least log odds of a moment, by those of all segments: what stands out from most of them."""
    known = [score for score in scores if math.isfinite(score)]
    if not known:
        return log_odds(LEAST_SCORE)
    middle = median(known)
    deviation = NORMAL_DEVIATION * median(abs(score - middle) for score in known)
    stands_out = middle + DEVIATIONS * deviation
    return min(max(stands_out, log_odds(LEAST_SCORE)), log_odds(SURE_SCORE))


def runs(scores: Sequence[float], least: float) -> list[Run]:
    """Join neighbouring segments whose score is at least `least`; return the runs, those with the best segment first."""
    found: list[Run] = []
    for place, score in enumerate(scores):
        if score < least:
            continue
        if found and found[-1].last == place - 1:
            before = found[-1]
            best = before.best if scores[before.best] >= score else place
            found[-1] = Run(before.first, best, place)
        else:
            found.append(Run(place, place, place))
    return sorted(found, key=lambda run: -scores[run.best])


def border(
    shown: Callable[[float], bool], outside_s: float, inside_s: float, precision_s: float, reach_s: float
) -> float:
    """Return the time between `outside_s` and `inside_s`, which may be the earlier, from which on it is shown, by bisection.

    Args:
        shown: tells of a time whether the frames around it show it; at `inside_s` they do.
        precision_s: of the result.
        reach_s: how far those frames are from the time, so that the border lies so much further inside. Where `outside_s` shows
            it too, that is returned.
    """
    if shown(outside_s):
        return outside_s
    inwards = math.copysign(reach_s, inside_s - outside_s)
    while abs(inside_s - outside_s) > 2 * precision_s:
        middle_s = (inside_s + outside_s) / 2
        if shown(middle_s):
            inside_s = middle_s
        else:
            outside_s = middle_s
    return (inside_s + outside_s) / 2 + inwards
