"""Intervals of accuracies of questions that are clustered by video, whose results depend on each other. numpy only."""

import math

import numpy as np

Z95 = 1.959964
DRAWS = 4000
_AT_ONCE = 2**22  # weights held at a time


def accuracy_interval(right: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    """The 95% interval of a share of right answers: Wilson's (1927), with the effective number of questions.

    That is the number of independent questions that would be as uncertain as these clusters are, at most the number of questions.
    Where all answers are right, or all wrong, their correlation is unknown, and it is the number of clusters.

    `right`, `asked`: `[C]`, right answers and questions of each cluster; clusters with no questions do not count.
    """
    right, asked = right[asked > 0].astype(float), asked[asked > 0].astype(float)
    clusters, total = len(asked), float(asked.sum())
    if not clusters:
        return 0.0, 1.0
    share = float(right.sum()) / total
    n = float(clusters)
    if 0 < share < 1 and clusters > 1:
        variance = float(((right - share * asked) ** 2).sum()) * clusters / (clusters - 1) / total**2
        n = min(total, share * (1 - share) / variance) if variance else total
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def resampled(sums: np.ndarray, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Totals of `sums` `[C, k]`, a row a cluster, over C clusters drawn with replacement: float64 `[draws, k]`.

    Every column sees the same draws, so that statistics of several columns are paired.
    """
    clusters, made = len(sums), []
    random = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // max(1, clusters))
    for first in range(0, draws, step):
        weights = random.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(step, draws - first))
        made.append(weights.astype(float) @ sums)
    return np.concatenate(made)


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95% of the finite values; NaN if there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def unseen_share(clusters: int) -> float:
    """The share of clusters that differ which all of so many drawn ones miss with a chance of 5%: about 3 / clusters."""
    return 1 - 0.05 ** (1 / clusters)
