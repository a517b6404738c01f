"""A method as the user names it: what acts on the input, inside the encoder, after it, and inside the language model."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

from evoprune.errors import UsageError
from evoprune.methods.base import EncoderMethod, InputMethod, LanguageMethod, Method, Selector, not_automatic
from evoprune.methods.encoder_plan import EncoderPlan, Grid, Inflection, Stage, TowerShape, full_plan


@dataclass(frozen=True)
class Pipeline:
    """`reuse+divprune`, `evoprune+fastv` or a method alone. The budget is that of the first part."""

    input: InputMethod | None = None
    encoder: EncoderMethod | None = None
    selector: Selector | None = None
    language: LanguageMethod | None = None
    inflection: bool = False  # whether the inflection of the selector's scores decides how many tokens it keeps

    @classmethod
    def of(cls, method: Method) -> Self:
        """One method alone; the base class itself prunes nothing."""
        classes = {"input": InputMethod, "encoder": EncoderMethod, "selector": Selector, "language": LanguageMethod}
        return cls(**{part: method for part, each in classes.items() if isinstance(method, each)})

    @property
    def members(self) -> list[Method]:
        """The parts that there are, in the order in which they act."""
        return [part for part in (self.input, self.encoder, self.selector, self.language) if part]

    @property
    def first(self) -> Method:
        return self.members[0] if self.members else Method()

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.members) or Method.name

    @property
    def acts(self) -> str:
        """Where the first part acts, as `Method.acts`."""
        return self.first.acts

    @property
    def before(self) -> "Pipeline":
        """What acts before the language model."""
        return replace(self, language=None)

    @property
    def tokens(self) -> Selector | None:
        """What selects the tokens after the tower; None where every row becomes a token."""
        return self.selector or (self.encoder.tokens if self.encoder else None)

    @property
    def exact(self) -> bool:
        """Whether exactly K tokens reach the language model; of a language method alone, whether it leaves exactly its own."""
        return not self.inflection and all(part.exact for part in self.before.members or self.members)

    @property
    def reads_question(self) -> bool:
        return self.tokens is not None and self.tokens.reads_question

    @property
    def weighs(self) -> bool:
        return self.tokens is not None and self.tokens.weighs

    @property
    def args(self) -> dict[str, Any]:
        """The settings as reports show them: those of the first part, and by name those of the others."""
        made = dict(self.first.args)
        if self.encoder and self.encoder.combines:
            made[self.tokens.name] = self.tokens.args
        if self.language and self.language is not self.first:
            made[self.language.name] = self.language.args | {"share": round(self.language.left, 4)}
        return made

    @property
    def reading(self) -> tuple[str, str]:
        """Where a method that reads the question is refused: what is wrong, and which method does not."""
        if self.encoder is None:
            return f"method {self.tokens.name} reads the question", "another method"
        name = self.encoder.name
        return f"method {name} selects with {self.tokens.name}, which reads the question", f"{name}+divprune"

    def automatic(self) -> Self:
        """The same with the first part `automatic`. Raises UsageError: it cannot be."""
        if len(self.before.members) > 1:
            raise not_automatic(self.before.name)
        return replace(Pipeline.of(self.first.automatic()), language=self.language)

    def by_inflection(self) -> Self:
        """The same with at most as many tokens as before the inflection of the scores. Raises UsageError: there are none."""
        if self.tokens is None or self.tokens.scores is None:
            name = self.tokens.name if self.selector or (self.encoder and self.encoder.combines) else self.first.name
            problem = f"method {name} has no scores whose curve could decide the budget"
            other = "take a method that ranks tokens, such as visionzip, with auto:inflection"
            raise UsageError(problem, f"give a share such as 0.25, or {other}")
        return replace(self, inflection=True)

    def acts_at(self, budget: float) -> bool:
        """Whether anything is pruned at `budget`, a share in (0, 1]."""
        later = self.language is not None and self.language is not self.first and self.language.left < 1
        return later or (bool(self.members) and budget < 1)

    def reported_budget(self, budget: float | str) -> float | str:
        """The budget for reports: 1.0 where nothing is pruned, else as given."""
        return budget if self.members else 1.0

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        """The encoder's work on one video of `grid`, of which `keep`, K, tokens are for the language model."""
        if self.input:
            return full_plan(tower, self.input.resize(grid, keep))
        if keep >= prod(grid) or not (self.encoder or self.selector):
            return full_plan(tower, grid)
        stages = [*self.encoder.stages(tower, grid, keep)] if self.encoder else []
        if self.tokens:
            stages.append(Stage(tower.depth, keep, Inflection(self.tokens) if self.inflection else self.tokens))
        return EncoderPlan(grid, keep, tower.depth, self.encoder.reuse if self.encoder else 0.0, tuple(stages))

    def language_share(self, budget: float) -> float:
        """The budget of the language method, in (0, 1], where the user asked for `budget`."""
        return budget if self.language is self.first else self.language.left

    def language_work(self, depth: int, tokens: int, budget: float) -> tuple[tuple[int, int, int], ...] | None:
        """As `LanguageMethod.work`, at the share `budget` that the user asked for; None where nothing leaves."""
        return self.language and self.language.work(depth, tokens, self.language_share(budget))

    def prompt_columns(self, depth: int, tokens: int, text: int, budget: float) -> int | tuple[int, ...]:
        """Positions of a prompt with `text` tokens of text, in each layer of the language model or in all; otherwise as above."""
        work = self.language_work(depth, tokens, budget)
        return tokens + text if work is None else tuple(keys + text for keys, _, _ in work)

    def prompt_work(self, depth: int, tokens: int, text: int, budget: float) -> int | list[tuple[int, ...]]:
        """The same for the cost: of each layer, the positions whose keys, queries and MLP it computes; or of all, a number."""
        work = self.language_work(depth, tokens, budget)
        return tokens + text if work is None else [tuple(count + text for count in layer) for layer in work]
