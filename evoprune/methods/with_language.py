"""A method that acts before the language model, and one that acts inside it: `evoprune+fastv`, `reuse+divprune+fastv:share=0.3`.

The budget is the first one's. The second leaves its own `share` of the tokens that arrive.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from evoprune.methods.base import Merger, Method, Selector
from evoprune.methods.language_method import LanguageMethod
from evoprune.pruning.encoder_plan import EncoderPlan, Grid, TowerShape
from evoprune.pruning.language_plan import LanguagePlan


@dataclass(frozen=True)
class WithLanguage(Method):
    """Fields: before, then: the two methods. All that concerns the encoder is the first one's."""

    before: Method | None = field(default=None, metadata={"method": True})
    then: LanguageMethod | None = field(default=None, metadata={"method": True})

    @property
    def name(self) -> str:
        return f"{self.before.name}+{self.then.name}"

    @property
    def source(self) -> str:
        return f"{self.before.source}; {self.then.source}"

    @property
    def acts(self) -> str:
        return self.before.acts

    @property
    def exact(self) -> bool:
        return self.before.exact

    @property
    def reads_question(self) -> bool:
        return self.before.reads_question

    @property
    def weighs(self) -> bool:
        return self.before.weighs

    @property
    def encoder(self) -> Method:
        return self.before

    @property
    def merger(self) -> Merger | None:
        return self.before.merger

    @property
    def selector(self) -> Selector | None:
        return self.before.selector

    @property
    def language(self) -> LanguageMethod:
        return self.then

    @property
    def share(self) -> float:
        """The share of what arrives that the second method leaves."""
        return self.then.default_share if self.then.share is None else self.then.share

    @property
    def args(self) -> dict[str, Any]:
        return {**self.before.args, self.then.name: self.then.args | {"share": round(self.share, 4)}}

    def automatic(self) -> "WithLanguage":
        return replace(self, before=self.before.automatic())

    def acts_at(self, budget: float) -> bool:
        return self.before.acts_at(budget) or self.share < 1

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        return self.before.plan(tower, grid, keep)

    def language_plan(self, depth: int, tokens: int, budget: float) -> LanguagePlan | None:
        return self.then.language_plan(depth, tokens, self.share)
