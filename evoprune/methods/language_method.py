"""What a method inside the language model is: its plan, and what stays behind a layer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from evoprune.methods.base import Method
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.language_plan import LanguagePlan
from evoprune.pruning.layer_tokens import LayerTokens
from evoprune.pruning.types import Selection


@dataclass(frozen=True)
class LanguageMethod(Method, ABC):
    """Drops visual tokens between layers of the language model, while it reads the prompt.

    A token that left is gone for all later layers and for decoding. The others keep their positions. Users name the method alone
    (`fastv -b 0.25`), where the budget is its own, or after one that acts before the language model (`evoprune+fastv`), where the
    budget is that one's and this method leaves `share` of what arrives. Either is the mean share of the visual tokens over the
    layers after the first drop.

    Field:
        share: for combinations, the budget of this method, in (0, 1]; None for `default_share`.

    Class attributes:
        default_share: its paper's.
    """

    acts: ClassVar[Literal["language"]] = "language"
    default_share: ClassVar[float] = 0.5

    share: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.share is not None:
            check_ranges(self, share="(0, 1]")

    @property
    def left(self) -> float:
        """The share of what arrives that it leaves in a combination."""
        return self.default_share if self.share is None else self.share

    @abstractmethod
    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        """The plan for a language model of `depth` layers that `tokens` visual tokens reach, at a budget of its own in (0, 1]."""

    @abstractmethod
    def select(self, tokens: LayerTokens) -> Selection | None:
        """What stays behind a layer after which the plan looks: `tokens.left` of the visual tokens, or fewer if not `exact`.

        Indices of the selection are those of `tokens.visual`, `size` is not read: a token keeps its own cluster size. None: nothing
        leaves here, which only a method that is not `exact` may return.
        """
