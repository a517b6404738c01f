"""Arithmetic for search.py: cuts a video into segments and determines from their scores which segments are moments.

A segment's score is a probability. This module uses log odds instead, because they separate high and low scores more clearly.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

SEGMENT_S = 8.0  # default length of a segment, in seconds
LEAST_PAIRS = 4  # minimum number of frame pairs per segment if neither a segment length nor a frame rate is set
# A segment is considered a moment only if its log odds exceed the median over all segments by at least this many deviations. This
# and the following constants were tuned on validation clips for both demo models. In most segments of these clips, the log odds for
# "no" are 4 to 7.
DEVIATIONS = 4.0
NORMAL_DEVIATION = 1.4826  # standard deviation of a normal distribution divided by its median absolute deviation
LEAST_SCORE = 0.96  # segments with lower scores are never moments, no matter how much they stand out
SURE_SCORE = 0.98  # segments with higher scores are always moments, even if most segments score this high
# Segments with log odds below the threshold by at most this much are also scored by pieces, which may raise their score.
MARGIN = 2.2


@dataclass(frozen=True)
class Segment:
    """A time span of a video to ask about. Times are in seconds from the video's first frame."""

    start_s: float
    end_s: float
    frames: int  # number of frames to sample

    @property
    def middle_s(self) -> float:
        return (self.start_s + self.end_s) / 2


@dataclass(frozen=True)
class Run:
    """A run of consecutive segments that match a query. The fields are the indices of the first, best, and last segments."""

    first: int
    best: int
    last: int


def cut(
    start_s: float, end_s: float, fps: float, pair_tokens: int, total_tokens: int | None, segment_s: float | None
) -> list[Segment]:
    """Cut a span of a video into segments of equal length, with at least one frame pair per segment.

    Args:
        start_s, end_s: Start and end of the span, in seconds.
        fps: Maximum number of frames per second.
        pair_tokens: Number of visual tokens per frame pair.
        total_tokens: Maximum total number of tokens, or None for no limit. If necessary, the frame rate is reduced to meet the
            limit.
        segment_s: Maximum segment length in seconds. If None, segments last `SEGMENT_S` seconds, or longer if `total_tokens` would
            otherwise leave fewer than `LEAST_PAIRS` frame pairs per segment.
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
    """Convert a probability to log odds, which are -inf for 0 and inf for 1."""
    if probability <= 0:
        return -math.inf
    if probability >= 1:
        return math.inf
    return math.log(probability / (1 - probability))


def probability(odds: float) -> float:
    """Convert log odds to a probability. This is the inverse of `log_odds`."""
    if odds < 0:
        return math.exp(odds) / (1 + math.exp(odds))
    return 1 / (1 + math.exp(-odds))


def least_odds(scores: Sequence[float]) -> float:
    """Return the minimum log odds for a segment to stand out enough to be considered a moment."""
    known = [score for score in scores if math.isfinite(score)]
    if not known:
        return log_odds(LEAST_SCORE)
    middle = median(known)
    deviation = NORMAL_DEVIATION * median(abs(score - middle) for score in known)
    stands_out = middle + DEVIATIONS * deviation
    return min(max(stands_out, log_odds(LEAST_SCORE)), log_odds(SURE_SCORE))


def runs(scores: Sequence[float], least: float) -> list[Run]:
    """Join adjacent segments with scores of at least `least` into runs, sorted by their best scores in descending order."""
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
    """Find the border of a moment by bisection.

    Args:
        shown: Function that returns True if the frames around a given time show the moment.
        outside_s: Time at which the search starts, in seconds. It is returned unchanged if the moment is shown at this time.
        inside_s: Time at which the moment is shown, in seconds. It may be before or after `outside_s`.
        precision_s: Precision of the result, in seconds.
        reach_s: Maximum distance in seconds between a frame and the time passed to `shown`. The resulting border is moved inward by
            this distance.
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
