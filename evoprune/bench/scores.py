"""The conversion of graded answers to a table of costs, accuracy, and intervals (`evoprune/eval@1`). Does not import torch.

A sample is a flat dict with one row's answer to one question. A row is `full`, `blind`, or a method at a budget. Answers about the
same video are correlated, so intervals are computed by resampling videos rather than answers. All rows answer the same questions,
so they share the same bootstrap draws.
"""

import math
from collections.abc import Sequence

import numpy as np

from evoprune.util import budget_text, counted

SCHEMA = "evoprune/eval@1"
FULL = "full"
BLIND = "blind"
METHOD = "method"
# The name of the group that contains all questions, and the prefix for groups that contain all questions of one type.
ALL = "all"
TYPE = "type:"
KEY = ("row", "method", "budget")  # fields that identify a table row
DIFFERENCES = ("difference", "first_difference")  # fields with an interval
LEAST_VIDEOS = 10  # with fewer videos, bootstrapped intervals are far too narrow; with a single video, they are points
LEAST_QUESTIONS = 30  # with fewer questions, the figures are an example rather than a measurement
COSTS = ("tokens", "layer_tokens", "kept_share", "live_share", "tflop_3b", "tflop_3b_tower", "tflop_3b_prefill")
Z95 = 1.959964
DRAWS = 4000
_AT_ONCE = 2**22  # number of bootstrap weights to hold in memory at a time


def row_name(row: str, method: str, budget: float | str) -> str:
    """Return the name of a row in tables, such as "evoprune -b 0.25" or "full"."""
    if row != METHOD:
        return row
    return f"{method} -b {budget_text(budget)}"


def score_rows(samples: Sequence[dict]) -> list[dict]:
    """Compute the results table, with one dict per question group and row. Failed samples are ignored.

    The group of all questions comes first, and in each group, `full` precedes all other rows. `difference` is the row's accuracy
    minus the accuracy of `full`, and `kept_of_full` is the ratio of the two. `first_difference` is the row's accuracy minus the
    accuracy of the row named in `first`, which is the first method at the same budget. The accuracy and both differences have a 95%
    interval over videos. A difference's interval is None if the group has fewer than `LEAST_VIDEOS` videos. `brier` is the result
    of `mean_brier`. Costs are means over the group's questions.
    """
    # Samples from earlier versions lack `layer_tokens`, because every layer read all tokens. The sort is stable, so rows stay in
    # order.
    good = [{"layer_tokens": s["tokens"]} | s for s in sorted(samples, key=lambda s: s["video"]) if "error" not in s]
    rows: dict[tuple, list[dict]] = {}
    for sample in good:
        rows.setdefault(tuple(sample[name] for name in KEY), []).append(sample)
    if not rows:
        return []
    first = next(iter(rows.values()))
    videos, cluster = np.unique([s["video"] for s in first], return_inverse=True)
    groups = _groups(first)
    # The first columns mark the questions in each group. The remaining columns mark each row's correct answers in each group.
    masks = np.array(list(groups.values())).T
    right = {key: np.array([s["right"] for s in answers]) for key, answers in rows.items()}
    columns = np.hstack([masks, *(masks & r[:, None] for r in right.values())]).astype(float)
    sums = np.zeros((len(videos), columns.shape[1]))
    np.add.at(sums, cluster, columns)
    drawn = resampled(sums).reshape(-1, 1 + len(rows), len(groups))
    sums = sums.reshape(len(videos), 1 + len(rows), len(groups))
    drawn[:, :, (sums[:, 0] > 0).sum(0) < LEAST_VIDEOS] = math.nan  # too few videos for an interval
    with np.errstate(divide="ignore", invalid="ignore"):
        share = drawn[:, 1:] / drawn[:, :1]
        ratio = share / share[:, :1]
    firsts = _firsts(list(rows))
    table = []
    for g, (group, mask) in enumerate(groups.items()):
        asked = sums[:, 0, g]
        accuracy = sums[:, 1:, g].sum(0) / mask.sum()
        for r, (key, answers) in enumerate(rows.items()):
            members = [s for s, counts in zip(answers, mask, strict=True) if counts]
            first = firsts[r]
            table.append(
                {
                    "row": key[0],
                    "name": row_name(*key),
                    **dict(zip(KEY[1:], key[1:], strict=True)),
                    "group": group,
                    "n": len(members),
                    "videos": int((asked > 0).sum()),
                    "right": int(sums[:, 1 + r, g].sum()),
                    "accuracy": _round(accuracy[r]),
                    **_interval("", accuracy_interval(sums[:, 1 + r, g], asked)),
                    "unparseable": sum(s["unparseable"] for s in members),
                    "brier": mean_brier(members),
                    **_difference("difference", accuracy, share[:, :, g], r, 0),
                    "kept_of_full": _round(accuracy[r] / accuracy[0]) if accuracy[0] else None,
                    **_interval("kept_", percentile_interval(ratio[:, r, g])),
                    "first": None if first is None else row_name(*list(rows)[first]),
                    **_difference("first_difference", accuracy, share[:, :, g], r, first),
                    **{name: _round(np.mean([s[name] for s in members])) for name in COSTS},
                }
            )
    return table


def brier(sample: dict) -> float:
    """Return a multiple-choice answer's Brier score, the squared distance between the option probabilities and the ground truth.

    The score ranges from 0 (certain and correct) to 2 (certain and wrong) (Brier, 1950, "Verification of forecasts expressed in
    terms of probability").
    """
    return sum((each["probability"] - (each["text"] == sample["expected"])) ** 2 for each in sample["choices"])


def mean_brier(samples: Sequence[dict]) -> float | None:
    """Return the mean Brier score of the multiple-choice answers among the samples, or None if there aren't any."""
    scores = [brier(sample) for sample in samples if sample.get("choices")]
    return _round(np.mean(scores)) if scores else None


def is_tie(row: dict, name: str) -> bool:
    """Return True if the interval of a difference (one of `DIFFERENCES`) includes 0."""
    return row[f"{name}_low"] is not None and row[f"{name}_low"] <= 0 <= row[f"{name}_high"]


def same_tokens(row: dict, other: dict) -> bool:
    """Return True if the language model reads the same number of tokens in both rows, averaged over questions and layers."""
    return abs(row["layer_tokens"] - other["layer_tokens"]) <= 0.5


def precision(rows: Sequence[dict]) -> str | None:
    """Describe the precision of the differences in `rows` in one sentence. Returns None if there are no differences.

    The precision is the largest distance between any difference and an end of its interval. If all intervals are points, the
    precision is instead derived from the sample size: it is the fraction of videos with different answers that a sample of this
    size would miss entirely with a probability of 5%.
    """
    compared = [row for row in rows if row["row"] == METHOD and row["group"] == ALL]
    if not compared:
        return None
    videos = compared[0]["videos"]
    asked = f"{counted(compared[0]['n'], 'question')} about {counted(videos, 'video')}"
    if videos < LEAST_VIDEOS:
        return f"{asked}: too few videos for intervals of differences, which need at least {LEAST_VIDEOS}"
    intervals = [(row[name], row[f"{name}_low"], row[f"{name}_high"]) for row in compared for name in DIFFERENCES]
    reach = max(max(value - low, high - value) for value, low, high in intervals if value is not None)
    # The fraction of videos with different answers that this sample misses entirely with a probability of 5%.
    unseen = 1 - 0.05 ** (1 / videos)
    points = math.ceil(1000 * (reach or unseen) - 1e-6) / 10
    return f"{asked}: differences are accurate to about ±{points:.1f} points"


def _firsts(keys: Sequence[tuple]) -> list[int | None]:
    """For each row, return the index of the first method's row at the same budget.

    The index is None for `full`, for `blind`, and for the first method's own rows.
    """
    first = next((method for row, method, _ in keys if row == METHOD), None)
    known = {budget: n for n, (row, method, budget) in enumerate(keys) if row == METHOD and method == first}
    firsts: list[int | None] = [None] * len(keys)
    for n, (row, method, budget) in enumerate(keys):
        if row == METHOD and method != first:
            firsts[n] = known.get(budget)
    return firsts


def _difference(name: str, accuracy: np.ndarray, drawn: np.ndarray, row: int, other: int | None) -> dict:
    """Return the paired difference between two rows and its interval, as result fields.

    Args:
        name: The name of the field with the difference.
        accuracy: The accuracy of each row, `[rows]`.
        drawn: The bootstrapped accuracy of each row, `[draws, rows]`.
        other: The index of the row to subtract. If it is None, all fields are None.
    """
    if other is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    interval = percentile_interval(drawn[:, row] - drawn[:, other])
    return {name: _round(accuracy[row] - accuracy[other]), **_interval(f"{name}_", interval)}


def _groups(samples: Sequence[dict]) -> dict[str, np.ndarray]:
    groups = {g for s in samples for g in s["groups"]} - {ALL}
    types = {s["type"] for s in samples if s["type"]}
    masks = {ALL: np.ones(len(samples), bool)}
    masks |= {name: np.array([name in s["groups"] for s in samples]) for name in sorted(groups)}
    return masks | {TYPE + name: np.array([s["type"] == name for s in samples]) for name in sorted(types)}


def _interval(name: str, interval: tuple[float, float]) -> dict[str, float | None]:
    return {f"{name}low": _round(interval[0]), f"{name}high": _round(interval[1])}


def _round(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def accuracy_interval(right: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of an accuracy, using the Wilson interval with the effective number of questions.

    The effective number is the number of independent questions that would have the same variance as the clusters, but at most the
    actual number of questions. If all answers are correct or all are wrong, the correlation within clusters is unknown, so the
    number of clusters is used instead.

    Args:
        right: The number of correct answers in each cluster, `[C]`.
        asked: The number of questions in each cluster, `[C]`. Clusters without questions are ignored.
    """
    right = right[asked > 0].astype(float)
    asked = asked[asked > 0].astype(float)
    clusters = len(asked)
    total = float(asked.sum())
    if not clusters:
        return 0.0, 1.0
    share = float(right.sum()) / total
    n = float(clusters)
    if 0 < share < 1 and clusters > 1:
        variance = share_variance(right, asked)
        n = total
        if variance:
            n = min(total, share * (1 - share) / variance)
    return wilson(share, n)


def share_variance(right: np.ndarray, asked: np.ndarray) -> float:
    """Estimate the variance of an accuracy from two or more clusters. See `accuracy_interval` for the arguments."""
    clusters = len(asked)
    total = float(asked.sum())
    residual = right - float(right.sum()) / total * asked
    return float((residual**2).sum()) * clusters / (clusters - 1) / total**2


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95% confidence interval of a proportion observed in `n` independent answers (Wilson, 1927)."""
    z = Z95**2 / n
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(z * share * (1 - share) + z**2 / 4) / (1 + z)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def resampled(sums: np.ndarray, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Bootstrap the column totals of `sums` by resampling its clusters.

    Args:
        sums: `[C, k]`, one row per cluster.
        seed: The seed of the random draws.
        draws: The number of bootstrap samples.

    Returns:
        float64 `[draws, k]`, totals over C clusters drawn with replacement. All k columns share the same draws.
    """
    clusters = len(sums)
    totals = []
    random = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // max(1, clusters))
    for first in range(0, draws, step):
        weights = random.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(step, draws - first))
        totals.append(weights.astype(float) @ sums)
    return np.concatenate(totals)


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the interval that contains the middle 95% of the finite values. Both ends are NaN if there are no finite values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
