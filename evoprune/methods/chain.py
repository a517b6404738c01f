"""Chains of up to four pruning methods. Every method that a user specifies is parsed into a chain, even a single one.

The four parts of a chain act on the input, inside the encoder, after the encoder, and inside the language model. A `PruneConfig`
combines a chain with a budget and a seed.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

import torch

from evoprune.backend import DeviceName
from evoprune.errors import UsageError, call
from evoprune.methods.base import EncoderMethod, InputMethod, Method, Selector, not_automatic
from evoprune.methods.budget import AUTO, AUTO_INFLECTION, Budget
from evoprune.methods.language import LanguageMethod
from evoprune.methods.plans import EncoderPlan, Grid, Stage, TowerShape
from evoprune.methods.registry import MethodText, impossible


@dataclass(frozen=True)
class MethodChain:
    """A single method, or a chain such as `reuse+divprune` or `evoprune+fastv`. The budget applies to the first method."""

    input: InputMethod | None = None
    encoder: EncoderMethod | None = None
    selector: Selector | None = None
    language: LanguageMethod | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a single method (as in `get`), or several methods joined by `+` in the order in which they act.

        Raises:
            UsageError: If `get` would raise it for one of the methods, or if the methods cannot act in this order.
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
        """Return a chain of these methods, assigning each method to the field for its type.

        Instances of the base class `Method` prune nothing, so they are ignored.
        """
        classes = {"input": InputMethod, "encoder": EncoderMethod, "selector": Selector, "language": LanguageMethod}
        return cls(**{part: method for method in methods for part, kind in classes.items() if isinstance(method, kind)})

    @property
    def possible(self) -> bool:
        """Whether the methods before the language model can be used together.

        This is the case if there is only one such method, or if a selector follows an encoder method with `combines`.
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
        """The point at which the first method of the chain acts, for example "input" or "after". See `Method.acts`."""
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

        If the chain contains only a language method, this property instead tells whether that method leaves exactly the requested
        number of tokens.
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
        """The settings as they appear in reports.

        The settings of the first method are at the top level. Settings of further methods are nested under the method's name.
        """
        args = dict(self.first.args)
        if self.encoder and self.encoder.combines:
            args[self.token_selector.name] = self.token_selector.args
        if self.language and self.language is not self.first:
            args[self.language.name] = self.language.args | {"share": round(self.language.left, 4)}
        return args

    @property
    def refusals(self) -> tuple[str, str]:
        """Two parts of the error message for methods that must not read the question: the problem and an alternative method."""
        if self.encoder is None:
            return f"method {self.token_selector.name} reads the question", "another method"
        name = self.encoder.name
        return f"method {name} selects with {self.token_selector.name}, which reads the question", f"{name}+divprune"

    def automatic(self) -> Self:
        """Return a copy of the chain that lets its first method choose the number of tokens. See `Method.automatic`.

        Raises:
            UsageError: If the first method does not support automatic budgets.
        """
        if len(self.before.members) > 1:
            raise not_automatic(self.before.name)
        return replace(MethodChain.of(self.first.automatic()), language=self.language)

    def check_scores(self) -> None:
        """Check that the selector has scores, which the "auto:inflection" budget needs to choose the number of tokens.

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
            UsageError: If the method reads the question. It would prune for the first question only.
        """
        if self.reads_question:
            hint = "ask single questions, or use another method: --method (method) evoprune"
            raise UsageError(f"method {self.name} prunes for a single question, so it cannot hold a conversation", hint)

    def plan(self, tower: TowerShape, grid: Grid, keep: int, inflection: bool = False) -> EncoderPlan:
        """Return the plan for encoding a video so that `keep` tokens reach the language model.

        Args:
            keep: K, the number of tokens for the language model.
            inflection: Whether the number of tokens is derived from the curve of the selector's scores. K is then the maximum.
        """
        if self.input:
            return EncoderPlan.full(tower, call(self.input.package, self.input.resize, grid, keep))
        if keep >= prod(grid) or not (self.encoder or self.selector):
            return EncoderPlan.full(tower, grid)
        stages = []
        reuse = 0.0
        below = self.after_tower_below(tower.launch_bound)
        if self.encoder and prod(grid) >= below:
            stages += call(self.encoder.package, self.encoder.stages, tower, grid, keep)
            reuse = self.encoder.reuse
        if self.token_selector:
            stages.append(Stage(tower.depth, keep, self.token_selector, inflection=inflection))
        return EncoderPlan(grid, keep, tower.depth, reuse, tuple(stages), below)

    def after_tower_below(self, launch_bound: int) -> int:
        """Return the number of units below which inputs are pruned only after the tower, or 0 if there is no such limit.

        Args:
            launch_bound: The number of units below which computing fewer rows saves no time. See `TowerShape`.
        """
        if not self.encoder or not self.encoder.small_after_tower:
            return 0
        return launch_bound

    def language_share(self, budget: float) -> float:
        """Return the budget of the method inside the language model, in (0, 1]. `budget` is the share that the user requested."""
        if self.language is self.first:
            return budget
        return self.language.left

    def language_work(self, depth: int, tokens: int, budget: float) -> tuple[tuple[int, int, int], ...] | None:
        """Return the number of visual tokens that each language-model layer computes, or None if no tokens are dropped.

        Args:
            tokens: The number of visual tokens that reach the language model.
            budget: The share of tokens that the user requested.

        Returns:
            Three counts per layer. See `LanguagePlan.work`.
        """
        if self.language is None:
            return None
        inner = self.language
        return call(inner.package, lambda: inner.drops(depth, tokens, self.language_share(budget)).work)

    def prompt_columns(self, depth: int, tokens: int, text: int, budget: float) -> int | tuple[int, ...]:
        """Return the number of prompt tokens (columns), visual tokens and text together.

        Args:
            text: The number of text tokens in the prompt. For the other arguments, see `language_work`.

        Returns:
            One number per layer, or a single number if no tokens are dropped inside the language model.
        """
        work = self.language_work(depth, tokens, budget)
        if work is None:
            return tokens + text
        return tuple(keys + text for keys, _, _ in work)


@dataclass(frozen=True)
class PruneConfig:
    """The pruning settings that are shared by planning, encoding, answering and reporting. Use `of` to create an instance."""

    name: str  # the method's name and settings, as the user wrote them
    method: MethodChain
    budget: Budget  # the full budget if the method prunes nothing
    seed: int = 0

    @classmethod
    def of(cls, budget: Budget, name: str, seed: int = 0) -> Self:
        """Return the config for a budget and a method.

        Args:
            name: The method as users write it, including any settings.
            seed: The seed for methods that draw random numbers.

        Raises:
            UsageError: If there is no such method or setting, or if the method does not support the automatic budget.
        """
        method = MethodChain.parse(name)
        if budget.name == AUTO:
            method = method.automatic()
        elif budget.name == AUTO_INFLECTION:
            method.check_scores()
        if not method.members:
            budget = Budget.FULL
        return cls(name, method, budget, seed)

    @property
    def prunes(self) -> bool:
        """Whether any tokens are pruned, inside the language model or before it."""
        inner = self.method.language
        return self.budget != Budget.FULL or (inner is not None and inner is not self.method.first and inner.left < 1)

    @property
    def resizes(self) -> bool:
        """Whether the method makes inputs smaller. If it does, its plan determines which frames to read."""
        return self.method.input is not None

    def plan(self, tower: TowerShape, grid: Grid) -> EncoderPlan:
        """Return the plan for encoding one input, including K, the number of tokens for the language model."""
        inflection = self.budget.name == AUTO_INFLECTION
        return self.method.plan(tower, grid, self.budget.keep(grid), inflection)

    def after_tower_below(self, device: torch.device) -> int:
        """Return the number of units below which inputs on `device` are pruned only after the tower.

        Returns 0 if there is no such limit.
        """
        if self.budget == Budget.FULL:
            return 0
        return self.method.after_tower_below(DeviceName(str(device)).launch_bound_units)
