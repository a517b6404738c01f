"""After Sparsity Meets Similarity (arXiv 2409.01162): the curve of a method's sorted scores says how many tokens are kept.

As in the paper's abstract: few visual tokens have a high score and many a low one, a long tail. The tokens before the
inflection point of the sorted scores are kept, so the content decides the count. The paper's score is the similarity to
a class token; here any method's scores will do (`Selector.scores`), and the method itself selects the tokens.
Filled in here, because no code is public and the paper's formula could not be read: the inflection point is where the
curve lies deepest below the straight line from its first to its last point, both axes scaled from 0 to 1; of equally
deep points the first. A curve that never lies below that line has no tail, and as many tokens are kept as are allowed.
Left out: the paper's second pruning, inside the language model.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch

from evoprune.errors import UsageError
from evoprune.methods.base import Method, Selector
from evoprune.methods.selecting import select
from evoprune.pruning.budget import AUTO_INFLECTION, AUTO_LEAST, keep_count
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import scaled
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Inflection(Selector):
    """Fields: of: the selector whose scores decide how many tokens it keeps."""

    source: ClassVar[str] = "after arXiv 2409.01162"
    exact: ClassVar[bool] = False

    of: Selector | None = field(default=None, metadata={"method": True})

    @property
    def name(self) -> str:
        return self.of.name

    @property
    def needs(self) -> frozenset[str]:
        return self.of.needs

    @property
    def reads_question(self) -> bool:
        return self.of.reads_question

    @property
    def args(self) -> dict[str, Any]:
        return self.of.args

    def select(self, tokens: Tokens, keep: int) -> Selection:
        least = min(keep, keep_count(AUTO_LEAST, len(tokens.owner)))
        return select(self.of, tokens, min(keep, max(least, inflection(self.of.scores(tokens)))))


def inflection(scores: torch.Tensor) -> int:
    """How many of `scores` (float `[N]`) lie before the inflection point of the sorted curve; N if it has none."""
    curve = scaled(scores.float().sort(descending=True).values)
    line = 1 - ascending(len(curve), curve.device) / max(1, len(curve) - 1)
    depth = snap(line - curve)
    return int(depth.argmax()) if depth.max() > 0 and curve[0] > 0 else len(curve)


def by_inflection(method: Method) -> Method:
    """`method` with its selector's count from the inflection of its scores, and at most the budget's.

    Raises:
        UsageError: it has no selector after the encoder, or one without scores.
    """
    if isinstance(method, Selector) and method.scores is not None:
        return Inflection(of=method)
    for held in fields(method):
        if held.metadata.get("method"):
            return replace(method, **{held.name: by_inflection(getattr(method, held.name))})
    raise UsageError(
        f"method {method.name} has no scores whose curve could decide the budget",
        f"give a share such as 0.25, or take a method that ranks tokens, such as visionzip, with {AUTO_INFLECTION}",
    )
