"""From scores to the rows of a table."""

from typing import Any

import numpy as np

from evoprune.tuning.search import Known, Scores
from evoprune.tuning.statistics import bounds, design_effect


def result_rows(known: Known, goal: float) -> list[dict[str, Any]]:
    """One dict a candidate that was tried, the fastest first.

    `agreement` is the share of the full answers' tokens at which the first choice is the full model's, with its 95% interval over
    videos; `kl` and `kl_p95` are nats a token; `first_token` is the time to the first token / that with nothing pruned, the median
    over videos; `passes`: the interval lies at or above the goal; `frontier`: no other is at least as fast and agrees more.
    """
    tried = {candidate: scores for candidate, scores in known.items() if scores.tokens}
    effect = design_effect([(np.array(s.agree, float), np.array(s.tokens, float)) for s in tried.values()])
    rows = []
    for candidate, scores in tried.items():
        agree, tokens, videos = sum(scores.agree), sum(scores.tokens), len(scores.tokens)
        low, high = bounds(agree, tokens, videos, effect)
        rows.append(
            {
                "name": candidate.name,
                "method": candidate.method,
                "budget": candidate.budget,
                "videos": videos,
                "tokens": tokens,
                "agreement": scores.share,
                "low": low,
                "high": high,
                "kl": float(np.mean(scores.kl)),
                "kl_p95": float(np.percentile(scores.kl, 95)),
                "first_token_ms": 1000 * float(np.median(scores.first_s)),
                "full_first_token_ms": 1000 * float(np.median(scores.full_s)),
                "first_token": scores.ratio,
                "kept_share": float(np.mean(scores.kept)),
                "live_share": float(np.mean(scores.live)),
                "passes": low >= goal,
                "frontier": not any(_beats(other, scores) for other in tried.values()),
            }
        )
    return sorted(rows, key=lambda row: row["first_token"])


def _beats(other: Scores, scores: Scores) -> bool:
    better = (other.ratio, -other.share), (scores.ratio, -scores.share)
    return other.ratio <= scores.ratio and other.share >= scores.share and better[0] != better[1]


def recommended(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest row that passes."""
    return min((row for row in rows if row["passes"]), key=lambda row: row["first_token"], default=None)
