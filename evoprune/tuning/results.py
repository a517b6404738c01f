"""From scores to the rows of a table."""

from collections import defaultdict
from statistics import mean, median
from typing import Any

import numpy as np

from evoprune.tuning.search import Candidate, Known
from evoprune.tuning.statistics import bounds, design_effect, smoothed

SAME_TIME = 0.05  # medians of times that differ by less are taken as equal


def result_rows(known: Known, goal: float) -> list[dict[str, Any]]:
    """One dict a candidate that was tried, the fastest first.

    `observed` is the share of the full answers' tokens at which the first choice is the full model's; `agreement` its estimate from
    all candidates (`statistics.smoothed`), with its 95% interval over videos. `kl` and `kl_p95` are nats a token. `first_token` is
    the time to the first token / that with nothing pruned, the median over videos and over candidates with the same work.
    `passes`: the interval lies at or above the goal. `frontier`: no other is at least as fast and agrees more.
    """
    tried = {candidate: scores for candidate, scores in known.items() if scores.tokens}
    effect = design_effect([(np.array(s.agree, float), np.array(s.tokens, float)) for s in tried.values()])
    rows, shares, times = [], _estimates(tried), _times(tried)
    for candidate, scores in tried.items():
        tokens, videos, share = sum(scores.tokens), len(scores.tokens), shares[candidate]
        low, high = bounds(share, tokens, videos, effect)
        rows.append(
            {
                "name": candidate.name,
                "method": candidate.method,
                "budget": candidate.budget,
                "videos": videos,
                "tokens": tokens,
                "agreement": share,
                "observed": scores.share,
                "low": low,
                "high": high,
                "kl": float(np.mean(scores.kl)),
                "kl_p95": float(np.percentile(scores.kl, 95)),
                "first_token_ms": 1000 * float(np.median(scores.first_s)),
                "full_first_token_ms": 1000 * float(np.median(scores.full_s)),
                "first_token": times[candidate],
                "kept_share": float(np.mean(scores.kept)),
                "live_share": float(np.mean(scores.live)),
                "passes": low >= goal,
            }
        )
    for row in rows:
        row["frontier"] = not any(_beats(other, row) for other in rows)
    return sorted(rows, key=lambda row: row["first_token"])


def _estimates(tried: Known) -> dict[Candidate, float]:
    """The agreement of each candidate, estimated among those that were tried on as many videos."""
    made = {}
    for videos in {len(scores.tokens) for scores in tried.values()}:
        group = {candidate: scores for candidate, scores in tried.items() if len(scores.tokens) == videos}
        sums = [(sum(s.agree), sum(s.tokens), np.mean(s.kl)) for s in group.values()]
        made |= dict(zip(group, smoothed(*map(np.array, zip(*sums, strict=True))).tolist(), strict=True))
    return made


def _times(tried: Known) -> dict[Candidate, float]:
    """`first_token` of each candidate.

    Settings of a method that compute as many rows and keep as many tokens do the same work. What differs in their times is noise.
    """
    of_work = defaultdict(list)
    works = {c: (c.method.partition(":")[0], round(mean(s.kept), 6), round(mean(s.live), 6)) for c, s in tried.items()}
    for candidate, scores in tried.items():
        of_work[works[candidate]] += [first / full for first, full in zip(scores.first_s, scores.full_s, strict=True)]
    return {candidate: median(of_work[work]) for candidate, work in works.items()}


def _beats(other: dict[str, Any], row: dict[str, Any]) -> bool:
    faster, nearer = row["first_token"] - other["first_token"], other["agreement"] - row["agreement"]
    return faster >= 0 and nearer >= 0 and faster + nearer > 0


def recommended(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest row that passes. Of those that are as fast, within `SAME_TIME`, the one with the fewest settings."""
    passing = [row for row in rows if row["passes"]]
    fastest = min((row["first_token"] for row in passing), default=0.0)
    as_fast = [row for row in passing if row["first_token"] <= fastest * (1 + SAME_TIME)]
    return min(as_fast, key=lambda row: (row["method"].count("="), row["first_token"]), default=None)
