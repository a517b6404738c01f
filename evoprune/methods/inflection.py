"""After Sparsity Meets Similarity (arXiv 2409.01162): the curve of a method's sorted scores says how many tokens are kept.

As in the paper's abstract: few visual tokens have a high score and many a low one, a long tail. The tokens before the
inflection point of the sorted scores are kept, so the content decides the count. The paper's score is the similarity to
a class token; here any method's scores will do (`Selector.scores`), and the method itself selects the tokens.
Filled in here, because no code is public and the paper's formula could not be read: the inflection point is where the
curve lies deepest below the straight line from its first to its last point, both axes scaled from 0 to 1; of equally
deep points the first. A curve that never lies below that line has no tail, and as many tokens are kept as are allowed.
Left out: the paper's second pruning, inside the language model.
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
