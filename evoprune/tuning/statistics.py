"""Agreement of candidates, and bounds that hold where a candidate never disagrees.

KL sees more in a token than whether the first choice is the same. So it orders the candidates, and agreement is estimated along
that order: one with a lower KL is not taken to agree less (isotonic regression, Ayer and others 1955).

The tokens of a video's answers depend on each other, so that they prove less than as many independent ones. How much less cannot be
seen from a candidate that agrees at every token. All candidates read the same answers, so those that disagree somewhere show it for
all: the design effect (Kish 1965), variance over videos / variance of independent tokens, is estimated from them together.
"""

import math
from collections.abc import Sequence

import numpy as np

from evoprune.evaluation.statistics import Z95

Counts = tuple[np.ndarray, np.ndarray]  # of a candidate: agreeing tokens and tokens of every video


def smoothed(agree: np.ndarray, tokens: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """The share of agreeing tokens of each of S candidates, as estimated from all of them: it does not rise with KL.

    Args:
        agree, tokens, kl: `[S]`, agreeing tokens, all tokens, and the mean KL.
    """
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


def bounds(share: float, tokens: int, videos: int, effect: float | None) -> tuple[float, float]:
    """The 95% interval of a share of agreeing tokens: Wilson's (1927), with tokens / design effect independent tokens.

    Args:
        share: of `tokens` of so many `videos`.
        effect: see `design_effect`. Where it is unknown, each video counts as one token.
    """
    n = float(videos) if effect is None else max(1.0, tokens / effect)
    z = Z95**2 / n
    middle, half = (share + z / 2) / (1 + z), math.sqrt(z * share * (1 - share) + z**2 / 4) / (1 + z)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def provable(tokens: float) -> float:
    """The highest lower bound that so many independent tokens can prove, all of them agreeing."""
    return tokens / (tokens + Z95**2)


def least_tokens(agree: float) -> int:
    """Independent tokens that prove this agreement if all of them agree; `agree` is below 1."""
    return math.ceil(agree * Z95**2 / (1 - agree) - 1e-9)
