"""The memory of a stream: which windows are thinned, and in which order their tokens go."""

from collections.abc import Sequence

import torch

from evoprune.methods.evoprune import FarthestPoints
from evoprune.methods.selecting import select
from evoprune.pruning.indices import ascending
from evoprune.pruning.types import Tokens
from evoprune.vision.encoded import Encoded, EncodedRows


def targets(windows: Sequence[tuple[int, int]], limit: int, most: int) -> list[int]:
    """How many tokens of each window stay, the oldest window first.

    The newest windows, which together have half of the limit, are whole. Of as many before them half of the tokens is due to stay, of
    as many before those a quarter, and so on until there are none. While there are more than `limit`, the oldest window that has more
    than is due loses half.

    Args:
        windows: of each, the tokens that are left, and those that there were.
        limit: tokens of all together, at least twice `most`.
        most: tokens of the largest window.
    """
    counts, whole = [left for left, _ in windows], max(1, limit // (2 * most))
    due = [full >> ((len(windows) - 1 - number) // whole) for number, (_, full) in enumerate(windows)]
    while sum(counts) > limit:
        oldest = next(number for number, count in enumerate(counts) if count > due[number])
        counts[oldest] = max(due[oldest], counts[oldest] // 2)
    return counts


@torch.inference_mode()
def staying_order(rows: EncodedRows, tokens: Encoded) -> torch.Tensor:
    """int64 `[K]` on the CPU: of each token of a window its place in the order in which they stay, 0 for the last one to go.

    The method selects half of the tokens again, then a quarter, and so on: what it selects most often stays longest. Where no
    selector made the tokens, they are selected as `evoprune` does.
    """
    stage, kept = rows.plan.token_stage, tokens.kept
    selector, given = (stage.selector, rows.tokens) if stage else (FarthestPoints(), _of_tokens(rows, tokens))
    often, count = torch.zeros_like(kept), len(kept) // 2
    while count:
        often += torch.isin(kept, select(selector, given, count).kept.to(kept.device))
        count //= 2
    return often.cpu().argsort(descending=True, stable=True).argsort()


def _of_tokens(rows: EncodedRows, tokens: Encoded) -> Tokens:
    """The tokens alone, as a selector sees them."""
    owner = torch.full_like(tokens.owner, -1)
    owner[tokens.kept] = ascending(len(tokens.kept), owner.device)
    return Tokens(tokens.features, owner, rows.plan.grid, rows.tokens.seconds_per_pair, rows.tokens.seed)
