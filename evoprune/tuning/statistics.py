"""Bounds of agreement that hold where a candidate never disagrees.

The tokens of a video's answers depend on each other, so that they prove less than as many independent ones. How much less cannot be
seen from a candidate that agrees at every token. All candidates read the same answers, so those that disagree somewhere show it for
all: the design effect (Kish 1965), variance over videos / variance of independent tokens, is estimated from them together.
"""

import math
from collections.abc import Sequence

import numpy as np

from evoprune.evaluation.statistics import Z95

Counts = tuple[np.ndarray, np.ndarray]  # of a candidate: agreeing tokens and tokens of every video


def design_effect(candidates: Sequence[Counts]) -> float | None:
    """How many tokens prove as much as one independent token; at least 1, None where no candidate shows it.

    Args:
        candidates: of each, `[V]` agreeing tokens and `[V]` tokens of its videos.
    """
    over_videos = independent = 0.0
    for agree, tokens in candidates:
        videos, total = len(tokens), float(tokens.sum())
        if videos < 2:
            continue
        share = float(agree.sum()) / total
        over_videos += float(((agree - share * tokens) ** 2).sum()) * videos / (videos - 1) / total**2
        independent += share * (1 - share) / total
    return max(1.0, over_videos / independent) if independent else None


def bounds(agree: int, tokens: int, videos: int, effect: float | None) -> tuple[float, float]:
    """The 95% interval of a share of agreeing tokens: Wilson's (1927), with tokens / design effect independent tokens.

    Args:
        effect: see `design_effect`. Where it is unknown, each video counts as one token.
    """
    n = float(videos) if effect is None else max(1.0, tokens / effect)
    share, z = agree / tokens, Z95**2 / n
    middle, half = (share + z / 2) / (1 + z), math.sqrt(z * share * (1 - share) + z**2 / 4) / (1 + z)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def provable(tokens: float) -> float:
    """The highest lower bound that so many independent tokens can prove, all of them agreeing."""
    return tokens / (tokens + Z95**2)


def least_tokens(agree: float) -> int:
    """Independent tokens that prove this agreement if all of them agree; `agree` is below 1."""
    return math.ceil(agree * Z95**2 / (1 - agree) - 1e-9)
