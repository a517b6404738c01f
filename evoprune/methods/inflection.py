"""A count of tokens from the curve of a method's sorted scores, after Sparsity Meets Similarity (arXiv 2409.01162).

docs/methods.md says what is filled in and left out.
"""

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.budget import AUTO_LEAST, keep_count
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import scaled
from evoprune.pruning.score import snap
from evoprune.pruning.types import Tokens


def tokens_before_inflection(selector: Selector, tokens: Tokens, keep: int) -> int:
    """How many tokens `selector` keeps by the curve of its scores: at most `keep`, and at least a twentieth of all units."""
    least = min(keep, keep_count(AUTO_LEAST, len(tokens.owner)))
    return min(keep, max(least, inflection(selector.scores(tokens))))


def inflection(scores: torch.Tensor) -> int:
    """How many of `scores` (float `[N]`) lie before the inflection point of the sorted curve; N if it has none."""
    curve = scaled(scores.float().sort(descending=True).values)
    line = 1 - ascending(len(curve), curve.device) / max(1, len(curve) - 1)
    depth = snap(line - curve)
    return int(depth.argmax()) if depth.max() > 0 and curve[0] > 0 else len(curve)
