"""From graded answers to a table: accuracy with intervals, beside what it cost (schema `evoprune/eval@1`). No torch.

A sample is the answer of one row (`full`, `blind`, or a method at a budget) to one question, as a flat dict; `run.py` makes them.
All rows answer the same questions, so rows are compared question by question, and bootstrapped with the same draws of videos.
"""

import math
from collections.abc import Sequence

import numpy as np

from evoprune.evaluation.statistics import accuracy_interval, percentile_interval, resampled
from evoprune.text import counted

SCHEMA = "evoprune/eval@1"
FULL, BLIND, METHOD = "full", "blind", "method"
ALL, TYPE = "all", "type:"  # the group of all questions, and the prefix of groups that are types
WIDE = 0.2  # an interval of accuracy that hides all but the largest differences
COSTS = ("tokens", "kept_share", "live_share", "tflop_3b", "tflop_3b_tower", "tflop_3b_prefill")


def row_name(kind: str, method: str, budget: float) -> str:
    """The name of a row in tables."""
    return kind if kind != METHOD else f"{method} -b {budget:g}"


def score_rows(samples: Sequence[dict]) -> list[dict]:
    """One dict a row and group, the group of all questions first, full before what is compared with it.

    Accuracies are shares; `difference` is accuracy - that of full, `kept_of_full` accuracy / that of full, each with a 95% interval
    over videos; costs are means over the group's questions. None where there is no number. Failed samples do not count.
    """
    good = sorted((s for s in samples if "error" not in s), key=lambda s: s["video"])  # stable: rows stay in order
    rows: dict[tuple, list[dict]] = {}
    for sample in good:
        rows.setdefault((sample["row"], sample["method"], sample["budget"]), []).append(sample)
    if not rows:
        return []
    first = next(iter(rows.values()))
    videos, cluster = np.unique([s["video"] for s in first], return_inverse=True)
    groups = _groups(first)
    # Columns: the questions of each group, then the right answers of each row in each group.
    masks = np.array(list(groups.values())).T
    right = {key: np.array([s["right"] for s in found]) for key, found in rows.items()}
    columns = np.hstack([masks, *(masks & r[:, None] for r in right.values())]).astype(float)
    sums = np.zeros((len(videos), columns.shape[1]))
    np.add.at(sums, cluster, columns)
    drawn = resampled(sums).reshape(-1, 1 + len(rows), len(groups))
    sums = sums.reshape(len(videos), 1 + len(rows), len(groups))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = drawn[:, 1:] / drawn[:, :1]
        ratio = share / share[:, :1]
    made = []
    for g, (group, mask) in enumerate(groups.items()):
        asked, full = sums[:, 0, g], sums[:, 1, g].sum() / mask.sum()
        for r, ((kind, method, budget), found) in enumerate(rows.items()):
            mine = [s for s, counts in zip(found, mask, strict=True) if counts]
            accuracy = sums[:, 1 + r, g].sum() / mask.sum()
            made.append(
                {
                    "row": kind,
                    "name": row_name(kind, method, budget),
                    "method": method,
                    "budget": budget,
                    "group": group,
                    "n": len(mine),
                    "videos": int((asked > 0).sum()),
                    "right": int(sums[:, 1 + r, g].sum()),
                    "accuracy": _round(accuracy),
                    **_interval("", accuracy_interval(sums[:, 1 + r, g], asked)),
                    "unparseable": sum(s["unparseable"] for s in mine),
                    "difference": _round(accuracy - full),
                    **_interval("difference_", percentile_interval(share[:, r, g] - share[:, 0, g])),
                    "kept_of_full": _round(accuracy / full) if full else None,
                    **_interval("kept_", percentile_interval(ratio[:, r, g])),
                    **{name: _round(float(np.mean([s[name] for s in mine]))) for name in COSTS},
                }
            )
    return made


def too_few(rows: Sequence[dict]) -> str | None:
    """A sentence that says so where rows have too few questions, or videos, to be compared; else None. `rows`: of `score_rows`."""
    full = next((row for row in rows if row["row"] == FULL and row["group"] == ALL), None)
    if full is None or full["low"] is None or full["high"] - full["low"] <= WIDE:
        return None
    asked = f"{counted(full['n'], 'question')} about {counted(full['videos'], 'video')}"
    few = "is" if full["n"] == 1 else "are"
    interval = f"{100 * full['low']:.0f} to {100 * full['high']:.0f}%"
    return f"{asked} {few} too few to compare rows: the 95% interval of full is {interval}"


def _groups(samples: Sequence[dict]) -> dict[str, np.ndarray]:
    """Which samples each group holds: bool, by its name."""
    made = {ALL: np.ones(len(samples), bool)}
    for name in sorted({group for s in samples for group in s["groups"]} - {ALL}):
        made[name] = np.array([name in s["groups"] for s in samples])
    for name in sorted({s["type"] for s in samples if s["type"]}):
        made[TYPE + name] = np.array([s["type"] == name for s in samples])
    return made


def _interval(name: str, interval: tuple[float, float]) -> dict[str, float | None]:
    return {f"{name}low": _round(interval[0]), f"{name}high": _round(interval[1])}


def _round(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
