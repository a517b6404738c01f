"""Compare two rows of an evaluation on the same questions. Imported by other experiments; not a script."""

import math
from collections.abc import Sequence

import numpy as np

LEAST_VIDEOS = 10  # with fewer videos, a bootstrapped interval is far too narrow
DRAWS = 4000


def paired_difference(samples: Sequence[dict], others: Sequence[dict]) -> tuple[float, float, float]:
    """Return how much more accurate the first row is, along with a 95% confidence interval over videos. All values are fractions.

    Both rows must have answered the same questions, in any order. If there are fewer than `LEAST_VIDEOS` videos, the interval is
    infinite.
    """
    right = {(s["video"], s["id"]): s["right"] for s in others}
    videos = {name: i for i, name in enumerate(sorted({s["video"] for s in samples}))}
    sums = np.zeros((len(videos), 2))
    for s in samples:
        sums[videos[s["video"]]] += (int(s["right"]) - int(right[s["video"], s["id"]]), 1)
    mean = float(sums[:, 0].sum() / sums[:, 1].sum())
    if len(videos) < LEAST_VIDEOS:
        return mean, -math.inf, math.inf
    every = np.full(len(videos), 1 / len(videos))
    drawn = np.random.default_rng(0).multinomial(len(videos), every, size=DRAWS).astype(float) @ sums
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
    return mean, float(low), float(high)


def in_points(mean: float, low: float, high: float) -> str:
    """Format an accuracy difference and its confidence interval, given as fractions, in percentage points."""
    if math.isinf(low):
        return f"{100 * mean:+.1f} (too few videos for an interval)"
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
