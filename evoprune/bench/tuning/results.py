"""From trials to the rows of a table: agreement of candidates, with bounds that hold where one never disagrees.

KL orders the candidates, and agreement is estimated along that order: one with a lower KL is not taken to agree less (isotonic
regression, Ayer and others 1955). The tokens of a video depend on each other, so that they prove less than independent ones: by the
design effect (Kish 1965), variance over videos / variance of independent tokens, estimated from all candidates together.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from evoprune.bench.evaluation.scores import Z95, share_variance, wilson
from evoprune.bench.tuning.search import Candidate, Known, Trial

Counts = tuple[np.ndarray, np.ndarray]  # of a candidate: agreeing tokens and tokens of every video

SAME_TIME = 0.05  # medians of times that differ by less are taken as equal


def result_rows(known: Known, goal: float) -> list[dict[str, Any]]:
    """One dict a candidate that was tried, the fastest first (docs/json.md).

    `agreement` is estimated from all candidates (`smoothed`), with its 95% interval over videos; `observed` is its own. `passes`:
    the interval lies at or above the goal. `frontier`: no other is at least as fast and agrees more.
    """
    tried = {candidate: Trial(*zip(*trials, strict=True)) for candidate, trials in known.items() if trials}  # of tuples
    effect = design_effect([(np.array(seen.agree, float), np.array(seen.tokens, float)) for seen in tried.values()])
    rows, shares, times = [], _estimates(tried), _times(tried)
    for candidate, seen in tried.items():
        tokens, videos, share, kl = sum(seen.tokens), len(seen.tokens), shares[candidate], np.concatenate(seen.kl)
        low, high = bounds(share, tokens, videos, effect)
        rows.append(
            {
                "name": candidate.name,
                "method": candidate.method,
                "budget": candidate.budget,
                "videos": videos,
                "tokens": tokens,
                "agreement": share,
                "observed": sum(seen.agree) / tokens,
                "low": low,
                "high": high,
                "kl": float(np.mean(kl)),
                "kl_p95": float(np.percentile(kl, 95)),
                "first_token_ms": 1000 * float(np.median(seen.first_s)),
                "full_first_token_ms": 1000 * float(np.median(seen.full_s)),
                "first_token": times[candidate],
                "kept_share": float(np.mean(seen.kept)),
                "live_share": float(np.mean(seen.live)),
                "passes": low >= goal,
            }
        )
    place = [(-row["first_token"], row["agreement"]) for row in rows]
    for row, own in zip(rows, place, strict=True):
        row["frontier"] = not any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in place)
    return sorted(rows, key=lambda row: row["first_token"])


def _estimates(tried: dict[Candidate, Trial]) -> dict[Candidate, float]:
    """The agreement of each, estimated among those that were tried on as many videos."""
    made = {}
    for videos in {len(seen.tokens) for seen in tried.values()}:
        group = {candidate: seen for candidate, seen in tried.items() if len(seen.tokens) == videos}
        sums = [(sum(seen.agree), sum(seen.tokens), np.mean(np.concatenate(seen.kl))) for seen in group.values()]
        made |= dict(zip(group, smoothed(*map(np.array, zip(*sums, strict=True))).tolist(), strict=True))
    return made


def _times(tried: dict[Candidate, Trial]) -> dict[Candidate, float]:
    """`first_token` of each. Settings of a method with equally many rows and tokens do the same work; times differ by noise."""
    of_work = defaultdict(list)
    works = {c: (c.method.partition(":")[0], round(mean(s.kept), 6), round(mean(s.live), 6)) for c, s in tried.items()}
    for candidate, seen in tried.items():
        of_work[works[candidate]] += [first / full for first, full in zip(seen.first_s, seen.full_s, strict=True)]
    return {candidate: median(of_work[work]) for candidate, work in works.items()}


def recommended(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest row that passes. Of those that are as fast, within `SAME_TIME`, the one with the fewest settings."""
    passing = [row for row in rows if row["passes"]]
    fastest = min((row["first_token"] for row in passing), default=0.0)
    as_fast = [row for row in passing if row["first_token"] <= fastest * (1 + SAME_TIME)]
    return min(as_fast, key=lambda row: (row["method"].count("="), row["first_token"]), default=None)


def smoothed(agree: np.ndarray, tokens: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """`[S]`: the share of `agree`ing `tokens` of each of S candidates, estimated from all: it does not rise with the mean `kl`."""
    blocks: list[tuple[float, float, list[int]]] = []  # agreeing tokens, tokens, and the candidates that share them
    for candidate in np.argsort(kl, kind="stable"):
        block = float(agree[candidate]), float(tokens[candidate]), [int(candidate)]
        while blocks and blocks[-1][0] * block[1] < block[0] * blocks[-1][1]:
            before = blocks.pop()
            block = before[0] + block[0], before[1] + block[1], before[2] + block[2]
        blocks.append(block)
    made = np.zeros(len(agree))
    for agreeing, all_tokens, members in blocks:
        made[members] = agreeing / all_tokens
    return made


def design_effect(candidates: Sequence[Counts]) -> float | None:
    """How many tokens prove as much as one independent token; at least 1, None where no candidate shows it."""
    over_videos = independent = 0.0
    for agree, tokens in candidates:
        if len(tokens) < 2:
            continue
        total = float(tokens.sum())
        share = float(agree.sum()) / total
        over_videos += share_variance(agree, tokens)
        independent += share * (1 - share) / total
    return max(1.0, over_videos / independent) if independent else None


def bounds(share: float, tokens: int, videos: int, effect: float | None) -> tuple[float, float]:
    """The 95% interval of a share, for tokens / `design_effect` independent tokens; one a video if that is None."""
    return wilson(share, float(videos) if effect is None else max(1.0, tokens / effect))


def provable(tokens: float) -> float:
    """The highest lower bound that so many independent tokens can prove, all of them agreeing."""
    return tokens / (tokens + Z95**2)


def least_tokens(agree: float) -> int:
    """Independent tokens that prove this agreement if all of them agree; `agree` is below 1."""
    return math.ceil(agree * Z95**2 / (1 - agree) - 1e-9)
