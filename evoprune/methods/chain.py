"""Chains of up to four pruning methods. User-specified methods are always parsed into a chain, even a single method.

The four components of a chain act on the input, inside the encoder, after the encoder, and inside the language model. A
`PruneConfig` combines a chain with a budget and a seed.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Self

import torch

from evoprune.backend import DeviceName
from evoprune.errors import UsageError, call
from evoprune.methods.base import EncoderMethod, InputMethod, Method, Selector, not_automatic
from evoprune.methods.budget import AUTO, AUTO_INFLECTION, Budget
from evoprune.methods.plans import EncoderPlan, Grid, Stage, TowerShape
from evoprune.methods.registry import MethodText, impossible

if TYPE_CHECKING:
    from evoprune.methods.language import LanguageMethod

# The fields of a `MethodChain`, by the point at which a method acts (`Method.acts`).
PARTS = {"input": "input", "inside": "encoder", "after": "selector", "language": "language"}


@dataclass(frozen=True)
class MethodChain:
    """A single method, or a chain such as `reuse+divprune` or `evoprune+fastv`. The budget applies to the first method."""

    input: InputMethod | None = None
    encoder: EncoderMethod | None = None
    selector: Selector | None = None
    language: "LanguageMethod | None" = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a single method (as in `get`), or several methods joined with `+` in the order in which they act.

        Raises:
            UsageError: If any method is invalid (see `get`), or if the methods cannot act in this order.
        """
        members = MethodText(text).members()
        chain = cls.of(*members)
        if len(members) > 1 and not (chain.members == members and chain.possible):
            raise impossible(text)
        language = chain.language
        if members == [language] and language.share is not None:
            name = language.name
            instead = f"{MethodText.DEFAULT}+{name}:share={language.share}"
            hint = f"set the budget (-b) instead of the share, or combine methods: {instead}"
            raise UsageError(f"method {name} takes a share only after another method", hint)
        return chain

    @classmethod
    def of(cls, *methods: Method) -> Self:
        """Create a chain of methods by assigning each method to the field for the point at which it acts.

        Instances of the base class `Method` prune nothing, so they are ignored.
        """
        return cls(**{PARTS[method.acts]: method for method in methods if method.acts in PARTS})

    @property
    def possible(self) -> bool:
        """Whether the methods that act before the language model can be used together.

        They can if there is only one such method, or if a selector follows an encoder method that sets `combines`.
        """
        before = self.before.members
        combines = self.encoder is not None and self.encoder.combines
        if before == [self.encoder, self.selector]:
            return combines
        return len(before) == 1 and not (combines and self.token_selector is None)

    @property
    def members(self) -> list[Method]:
        """The methods in the chain, in the order in which they act."""
        return [part for part in (self.input, self.encoder, self.selector, self.language) if part]

    @property
    def first(self) -> Method:
        return self.members[0] if self.members else Method()

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.members) or Method.name

    @property
    def acts(self) -> str:
        """The point at which the chain's first method acts, for example "input" or "after". See `Method.acts`."""
        return self.first.acts

    @property
    def before(self) -> "MethodChain":
        """A copy of the chain without the method that acts inside the language model."""
        return replace(self, language=None)

    @property
    def token_selector(self) -> Selector | None:
        """The selector that runs after the vision tower, or None if every row becomes a token."""
        if self.selector or not self.encoder:
            return self.selector
        return self.encoder.tokens

    @property
    def exact(self) -> bool:
        """Whether exactly K tokens reach the language model.

        If the chain contains only a language method, this instead indicates whether that method keeps exactly the requested number
        of tokens.
        """
        return all(part.exact for part in self.before.members or self.members)

    @property
    def reads_question(self) -> bool:
        return self.token_selector is not None and self.token_selector.reads_question

    @property
    def weighs(self) -> bool:
        return self.token_selector is not None and self.token_selector.weighs

    @property
    def args(self) -> dict[str, Any]:
        """The chain's settings as shown in reports.

        The first method's settings are at the top level. The settings of all other methods are nested under the method name.
        """
        args = dict(self.first.args)
        if self.encoder and self.encoder.combines:
            args[self.token_selector.name] = self.token_selector.args
        if self.language and self.language is not self.first:
            args[self.language.name] = self.language.args | {"share": round(self.language.left, 4)}
        return args

    @property
    def refusals(self) -> tuple[str, str]:
        """Two parts of the error message for methods that must not depend on the question: the problem and an alternative."""
        if self.encoder is None:
            return f"method {self.token_selector.name} reads the question", "another method"
        name = self.encoder.name
        return f"method {name} selects with {self.token_selector.name}, which reads the question", f"{name}+divprune"

    def automatic(self) -> Self:
        """Return a copy of the chain in which the first method chooses the number of tokens. See `Method.automatic`.

        Raises:
            UsageError: If the first method does not support automatic budgets.
        """
        if len(self.before.members) > 1:
            raise not_automatic(self.before.name)
        return replace(MethodChain.of(self.first.automatic()), language=self.language)

    def check_scores(self) -> None:
        """Check that the selector provides scores, which the "auto:inflection" budget requires.

        Raises:
            UsageError: If the selector has no scores, or if there is no selector.
        """
        if self.token_selector is None or self.token_selector.scores is None:
            name = self.first.name
            if self.selector or (self.encoder and self.encoder.combines):
                name = self.token_selector.name
            problem = f"method {name} has no scores to choose the budget from"
            alternative = "use auto:inflection with a method that ranks tokens, such as visionzip"
            raise UsageError(problem, f"give a share such as 0.25, or {alternative}")

    def check_conversation(self) -> None:
        """Check that the chain can be used in conversations.

        Raises:
            UsageError: If the method reads the question, because it would prune for the first question only.
        """
        if self.reads_question:
            hint = "ask single questions, or use another method: --method (method) evoprune"
            raise UsageError(f"method {self.name} prunes for a single question, so it cannot hold a conversation", hint)

    def plan(self, tower: TowerShape, grid: Grid, keep: int, inflection: bool = False) -> EncoderPlan:
        """Return the plan for encoding a video so that `keep` tokens reach the language model.

        Args:
            keep: K, the number of tokens for the language model.
            inflection: Whether to derive the number of tokens from the curve of the selector's scores, with K as the maximum.

        Raises:
            UsageError: If the token selector cannot be used with this tower.
        """
        if self.input:
            return EncoderPlan.full(tower, call(self.input.package, self.input.resize, grid, keep))
        if keep >= prod(grid) or not (self.encoder or self.selector):
            return EncoderPlan.full(tower, grid)
        stages = []
        reuse = 0.0
        predict = False
        below = self.after_tower_below(tower.launch_bound)
        if self.encoder and prod(grid) >= below:
            stages += call(self.encoder.package, self.encoder.stages, tower, grid, keep)
            reuse = self.encoder.reuse
            predict = self.encoder.predict
        if self.token_selector:
            call(self.token_selector.package, self.token_selector.check_tower, tower)
            stages.append(Stage(tower.depth, keep, self.token_selector, inflection=inflection))
        return EncoderPlan(grid, keep, tower.depth, reuse, tuple(stages), below, predict)

    def after_tower_below(self, launch_bound: int) -> int:
        """Return the number of units below which inputs are pruned only after the tower, or 0 if there is no limit.

        Args:
            launch_bound: The number of units below which computing fewer rows does not save time. See `TowerShape`.
        """
        if not self.encoder or not self.encoder.small_after_tower:
            return 0
        return launch_bound

    def language_share(self, budget: float) -> float:
        """Return the budget of the method inside the language model, in (0, 1]. `budget` is the user-requested fraction."""
        if self.language is self.first:
            return budget
        return self.language.left

    def language_work(
        self, depth: int, tokens: int, budget: float, linear: Collection[int] = ()
    ) -> tuple[tuple[int, int, int], ...] | None:
        """Return the number of visual tokens that each language-model layer computes, or None if no tokens are dropped.

        Args:
            tokens: The number of visual tokens that reach the language model.
            budget: The user-requested fraction of tokens.
            linear: The indices of the layers without attention. See `LanguageMethod.plan`.

        Returns:
            Three counts per layer. See `LanguagePlan.work`.

        Raises:
            UsageError: If the method cannot be used with these layers.
        """
        if self.language is None:
            return None
        inner = self.language
        return call(inner.package, lambda: inner.plan(depth, tokens, self.language_share(budget), linear).work)

    def prompt_columns(
        self, depth: int, tokens: int, text: int, budget: float, linear: Collection[int] = ()
    ) -> int | tuple[int, ...]:
        """Return the total number of prompt tokens (columns), both visual and text.

        Args:
            text: The number of text tokens in the prompt. See `language_work` for the other arguments.

        Returns:
            One number per layer, or a single number if no tokens are dropped inside the language model.
        """
        work = self.language_work(depth, tokens, budget, linear)
        if work is None:
            return tokens + text
        return tuple(keys + text for keys, _, _ in work)


@dataclass(frozen=True)
class PruneConfig:
    """The pruning settings shared by planning, encoding, answering, and reporting. Use `of` to create an instance."""

    name: str  # the method's name and settings as specified by the user
    method: MethodChain
    budget: Budget  # the full budget if the method does not prune
    seed: int = 0

    @classmethod
    def of(cls, budget: Budget, name: str, seed: int = 0) -> Self:
        """Create a config for a budget and a method.

        Args:
            name: The method as specified by the user, including any settings.
            seed: The seed for methods that use random numbers.

        Raises:
            UsageError: If the method or setting does not exist, or if the method does not support the automatic budget.
        """
        method = MethodChain.parse(name)
        if budget.name == AUTO:
            method = method.automatic()
        elif budget.name == AUTO_INFLECTION:
            method.check_scores()
        if not method.members:
            budget = Budget.FULL
        return cls(name, method, budget, seed)

    def config(self) -> Self:
        """Return the object itself, so that plans accept it and options that are converted later; see `Plan.pruning`."""
        return self

    @property
    def prunes(self) -> bool:
        """Whether any tokens are pruned, either before or inside the language model."""
        inner = self.method.language
        return self.budget != Budget.FULL or (inner is not None and inner is not self.method.first and inner.left < 1)

    @property
    def resizes(self) -> bool:
        """Whether the method makes inputs smaller. If so, its plan determines which frames to read."""
        return self.method.input is not None

    def plan(self, tower: TowerShape, grid: Grid) -> EncoderPlan:
        """Return the plan for encoding one input, including K, the number of tokens for the language model."""
        inflection = self.budget.name == AUTO_INFLECTION
        return self.method.plan(tower, grid, self.budget.keep(grid), inflection)

    def after_tower_below(self, device: torch.device) -> int:
        """Return the number of units below which inputs on `device` are pruned only after the tower.

        Returns 0 if there is no limit.
        """
        if self.budget == Budget.FULL:
            return 0
        return self.method.after_tower_below(DeviceName(str(device)).launch_bound_units)
