"""The DART method, which keeps the tokens least similar to a few pivot tokens."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import ranked
from evoprune.methods import Selection, Selector, Tokens, snap


@dataclass(frozen=True)
class Dart(Selector):
    """DART (arXiv 2502.11494): keeps the tokens least similar to a few pivot tokens.

    The pivots are the `visual` visual tokens and the `text` question tokens with the largest L1 norms. Visual pivots are always
    kept. The remaining budget is divided evenly among the pivots, and each pivot in turn selects the tokens with the lowest cosine
    similarity to it.

    Differences from the paper: the paper compares hidden states of the language model, while this method compares its input
    embeddings, like TensorRT-Edge-LLM. The authors' code processes the pivots in the order of a Python set. Here, pivots are
    processed in descending order of norm.
    """

    name = "dart"
    source = "arXiv 2502.11494"

    visual: Annotated[int, "[0, inf)"] = 4  # number of visual pivots
    text: Annotated[int, "[0, inf)"] = 4  # number of question pivots; if 0, the question is ignored

    def __post_init__(self):
        super().__post_init__()
        if not self.visual + self.text:
            raise ValueError("visual and text are both 0; at least one must be above 0")

    @property
    def reads_question(self) -> bool:
        return self.text > 0

    def select(self, tokens: Tokens, keep: int) -> Selection:
        unit = tokens.normalised
        first = longest(tokens.features.float(), min(self.visual, keep))
        pivots = unit[first]
        if self.text:
            pivots = torch.cat([pivots, F.normalize(tokens.question[longest(tokens.question, self.text)], dim=1)])
        unlike = -snap(unit @ pivots.T)
        unlike[first] = -torch.inf
        per_pivot, odd = divmod(keep - len(first), len(pivots))
        selected = [first]
        for pivot in range(len(pivots)):
            selected.append(ranked(unlike[:, pivot])[: per_pivot + (pivot < odd)])
            unlike[selected[-1]] = -torch.inf
        return Selection(torch.cat(selected).sort().values)


def longest(x: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the rows with the largest L1 norms, longest first: int64 `[min(count, n)]`.

    `x` is `[n, D]`. Ties go to the lower index.
    """
    norm = x.abs().sum(1)
    return ranked(snap(norm / norm.max().clamp(min=1e-12)))[:count]
