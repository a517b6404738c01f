"""A method as the user names it: what acts on the input, inside the encoder, after it, and inside the language model.

With a budget and a seed it is a `PruneConfig`. Also runs a selector, and checks what one of another package returns. The checks
synchronise; built-in selectors need none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

import torch

from evoprune.backend import limits
from evoprune.backend.devices import HOST
from evoprune.errors import PluginError, UsageError, call
from evoprune.methods import registry
from evoprune.methods.base import EncoderMethod, InputMethod, LanguageMethod, Method, Selector, not_automatic
from evoprune.methods.budget import AUTO, AUTO_INFLECTION, AUTO_LEAST, FULL, Budget, keep_count
from evoprune.methods.plans import EncoderPlan, Grid, Stage, TowerShape, full_plan
from evoprune.methods.ranking import scaled, snap
from evoprune.methods.types import Selection, Tokens, arange_on
from evoprune.model.numerics import without_autocast


@dataclass(frozen=True)
class MethodChain:
    """Chain methods: `reuse+divprune`, `evoprune+fastv` or one alone. The budget is that of the first part."""

    input: InputMethod | None = None
    encoder: EncoderMethod | None = None
    selector: Selector | None = None
    language: LanguageMethod | None = None

    @classmethod
    def parse(cls, text: str, args: dict[str, str] | None = None) -> Self:
        """Return what `text` names: a method as of `registry.get`, or several joined by `+` in the order in which they act.

        Raises UsageError: as `registry.get`; `args` for several; methods that cannot act in this order.
        """
        members = registry.members(text, args)
        chain = cls.of(*members)
        if len(members) > 1 and not (chain.members == members and chain.possible):
            raise registry.impossible(text)
        language = chain.language
        if members == [language] and language.share is not None:
            name = language.name
            instead = f"{registry.DEFAULT}+{name}:share={language.share}"
            hint = f"the budget (-b) is the share of a method alone; or combine it: {instead}"
            raise UsageError(f"method {name} has a share, and nothing acts before it", hint)
        return chain

    @classmethod
    def of(cls, *methods: Method) -> Self:
        """Return each of the methods in its place; the base class itself prunes nothing and has none."""
        classes = {"input": InputMethod, "encoder": EncoderMethod, "selector": Selector, "language": LanguageMethod}
        return cls(**{part: method for method in methods for part, kind in classes.items() if isinstance(method, kind)})

    @property
    def possible(self) -> bool:
        """Return whether the methods before the language model can act together: one, or one that combines and a selector."""
        before = self.before.members
        combines = self.encoder is not None and self.encoder.combines
        if before == [self.encoder, self.selector]:
            return combines
        return len(before) == 1 and not (combines and self.token_selector is None)

    @property
    def members(self) -> list[Method]:
        """Return the parts that there are, in the order in which they act."""
        return [part for part in (self.input, self.encoder, self.selector, self.language) if part]

    @property
    def first(self) -> Method:
        return self.members[0] if self.members else Method()

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.members) or Method.name

    @property
    def acts(self) -> str:
        """Say where the first part acts, as `Method.acts`."""
        return self.first.acts

    @property
    def before(self) -> "MethodChain":
        """Return the parts that act before the language model."""
        return replace(self, language=None)

    @property
    def token_selector(self) -> Selector | None:
        """Return the selector of the tokens after the tower; None where every row becomes a token."""
        if self.selector or not self.encoder:
            return self.selector
        return self.encoder.tokens

    @property
    def exact(self) -> bool:
        """Return whether exactly K tokens reach the language model; for a language method alone, whether it leaves exactly its own
        number.
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
        """Return the settings as reports show them: first those of the first part, then by name those of the others."""
        args = dict(self.first.args)
        if self.encoder and self.encoder.combines:
            args[self.token_selector.name] = self.token_selector.args
        if self.language and self.language is not self.first:
            args[self.language.name] = self.language.args | {"share": round(self.language.left, 4)}
        return args

    @property
    def refusals(self) -> tuple[str, str]:
        """Return the texts for where a method that reads the question is refused: what is wrong, and which method does not."""
        if self.encoder is None:
            return f"method {self.token_selector.name} reads the question", "another method"
        name = self.encoder.name
        return f"method {name} selects with {self.token_selector.name}, which reads the question", f"{name}+divprune"

    def automatic(self) -> Self:
        """Return the same with the first part `automatic`. Raises UsageError: it cannot be."""
        if len(self.before.members) > 1:
            raise not_automatic(self.before.name)
        return replace(MethodChain.of(self.first.automatic()), language=self.language)

    def check_scores(self) -> None:
        """Raise UsageError if its tokens have no scores, whose inflection could decide how many are kept."""
        if self.token_selector is None or self.token_selector.scores is None:
            name = self.first.name
            if self.selector or (self.encoder and self.encoder.combines):
                name = self.token_selector.name
            problem = f"method {name} has no scores whose curve could decide the budget"
            alternative = "take a method that ranks tokens, such as visionzip, with auto:inflection"
            raise UsageError(problem, f"give a share such as 0.25, or {alternative}")

    def plan(self, tower: TowerShape, grid: Grid, keep: int, inflection: bool = False) -> EncoderPlan:
        """Return the encoder's work on one video of `grid`, of which `keep`, K, tokens are for the language model.

        `inflection`: whether the curve of the selector's scores decides how many tokens are kept, at most K.
        """
        if self.input:
            return full_plan(tower, call(self.input.package, self.input.resize, grid, keep))
        if keep >= prod(grid) or not (self.encoder or self.selector):
            return full_plan(tower, grid)
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
        """Return the number of units below which it prunes an input after the tower alone; 0 if no size changes what it does.

        `launch_bound`: as in `TowerShape`.
        """
        if not self.encoder or not self.encoder.small_after_tower:
            return 0
        return launch_bound

    def language_share(self, budget: float) -> float:
        """Return the budget of the language method, in (0, 1], where the user asked for `budget`."""
        if self.language is self.first:
            return budget
        return self.language.left

    def language_work(self, depth: int, tokens: int, budget: float) -> tuple[tuple[int, int, int], ...] | None:
        """Return the work as `LanguageMethod.work`, at the share `budget` that the user asked for; None where nothing leaves."""
        if self.language is None:
            return None
        return call(self.language.package, self.language.work, depth, tokens, self.language_share(budget))

    def prompt_columns(self, depth: int, tokens: int, text: int, budget: float) -> int | tuple[int, ...]:
        """Count the positions of a prompt with `text` tokens of text, in each layer of the language model or in all; otherwise as
        above.
        """
        work = self.language_work(depth, tokens, budget)
        if work is None:
            return tokens + text
        return tuple(keys + text for keys, _, _ in work)


@dataclass(frozen=True)
class PruneConfig:
    """Say how visual tokens are pruned, as planning, encoding, answering and reports carry it. Made by `of`."""

    name: str  # of the method, as the user wrote it
    method: MethodChain
    budget: Budget  # the full one if the method is none
    seed: int = 0

    @classmethod
    def of(cls, budget: float | str | Budget, name: str, args: dict[str, str] | None = None, seed: int = 0) -> Self:
        """Return what a budget, and a method with settings as texts, stand for.

        Raises UsageError: a wrong budget; no such method or setting; or a budget of "auto" where the method cannot let the content
        decide.
        """
        wanted = Budget.parse(budget, auto=True)
        method = MethodChain.parse(name, args)
        if wanted.name == AUTO:
            method = method.automatic()
        elif wanted.name == AUTO_INFLECTION:
            method.check_scores()
        if not method.members:
            wanted = FULL
        return cls(name, method, wanted, seed)

    @property
    def prunes(self) -> bool:
        """Return whether anything is pruned."""
        inner = self.method.language
        return self.budget != FULL or (inner is not None and inner is not self.method.first and inner.left < 1)

    @property
    def resizes(self) -> bool:
        """Return True if the method makes inputs smaller, so that frames depend on its plan."""
        return self.method.input is not None

    def plan(self, tower: TowerShape, grid: Grid) -> EncoderPlan:
        """Return the encoder's work on one input, of which K tokens are for the language model."""
        inflection = self.budget.name == AUTO_INFLECTION
        return self.method.plan(tower, grid, self.budget.keep(grid), inflection)

    def after_tower_below(self, device: torch.device) -> int:
        """Return the number of units below which a device prunes an input after the tower alone; 0 if no size changes anything."""
        if self.budget == FULL:
            return 0
        return self.method.after_tower_below(limits.launch_bound_units(str(device)))


# Selectors are run, and those of other packages checked.


def select(selector: Selector, tokens: Tokens, keep: int) -> Selection:
    """Return what `selector` selects. Raises PluginError: one of another package returned what its base class does not allow."""
    name = selector.package
    units = len(tokens.unit_to_row)
    with without_autocast():
        # Rows are shared with other methods of an evaluation, and a stranger's code may write into what it gets.
        if name:
            tokens = tokens.copied()
        selection = call(name, selector.select, tokens, keep)
    if name:
        count = getattr(getattr(selection, "kept", None), "shape", (0,))[0]
        enough = bool(count) and (selector.suffices(count, keep, units) or not selector.exact)
        check_selection(name, selection, enough, keep, units, tokens.rows.device)
    return selection


def check_selection(name: str, selection: Selection, enough: bool, keep: int, units: int, device: torch.device) -> None:
    """Raises PluginError: what the method `name` selected is wrong.

    `enough`: whether the number of units is one that the method may return where `keep` of `units` were asked for.
    """
    if wrong := next(_faults(selection, enough, keep, units, device), None):
        raise PluginError(f"{name} returned {wrong}", "report it to that package's authors, or choose another method")


def _faults(selection: Selection, enough: bool, keep: int, units: int, device: torch.device) -> Iterator[str]:
    """Yield what is wrong with a selection, the first thing first: later ones are not meaningful."""
    if not isinstance(selection, Selection):
        yield f"an object of class {type(selection).__name__} where a Selection was asked for"
    kept = selection.kept
    yield from _unlike("kept", kept, torch.int64, None, device)
    if not enough:
        yield f"{len(kept):,} units where {keep:,} were asked for"
    if not (kept[1:] > kept[:-1]).all():
        yield "units that are not in ascending order"
    if len(kept) and (kept[0] < 0 or kept[-1] >= units):
        yield f"units from {int(kept[0]):,} to {int(kept[-1]):,} of a video with units 0 to {units - 1:,}"
    count = len(kept)
    if (token := selection.unit_to_token) is not None:
        yield from _unlike("unit_to_token", token, torch.int64, units, device)
        own = arange_on(count, kept.device)
        if token.min() < -1 or token.max() >= count or not (token[kept].to(own) == own).all():
            yield "a unit_to_token that is not the index of a kept unit, of each kept unit its own, or -1"
    if selection.weight is not None:
        yield from _unlike("weight", selection.weight, torch.float32, units, device)
        if not (
            selection.weight.isfinite().all() and (selection.weight >= 0).all() and (selection.weight[kept] > 0).all()
        ):
            yield "a weight that is not a number, below 0, or 0 for a kept unit"
    if selection.means is not None:
        yield from _wrong_means(selection.means, count, units, device)
    if selection.size is not None:
        yield from _unlike("size", selection.size, torch.float32, count, device)
        if not (selection.size.isfinite().all() and (selection.size > 0).all()):
            yield "a size that is not a number above 0"


def _wrong_means(means: tuple[torch.Tensor, ...], count: int, units: int, device: torch.device) -> Iterator[str]:
    if not isinstance(means, tuple) or len(means) != 3:
        yield "means that are not three tensors"
    token, unit, weight = means
    for name, value, dtype in (
        ("tokens", token, torch.int64),
        ("units", unit, torch.int64),
        ("weights", weight, torch.float32),
    ):
        yield from _unlike(f"means, {name}", value, dtype, len(token), device)
    outside = (token < 0) | (token >= count) | (unit < 0) | (unit >= units)
    total = torch.zeros(count, dtype=torch.float32, device=token.device)
    if outside.any() or not (weight >= 0).all() or not (total.index_add_(0, token, weight) > 0).all():
        yield "means of units that do not exist, or with weights that are not numbers above 0"


def _unlike(
    name: str, value: torch.Tensor, dtype: torch.dtype, length: int | None, device: torch.device
) -> Iterator[str]:
    """Yield how a tensor of a selection differs from what it must be: one dimension, `length` (None for any), dtype and device."""
    if not isinstance(value, torch.Tensor):
        yield f"an object of class {type(value).__name__} as {name} where a tensor was asked for"
    shape = "[K]" if length is None else f"[{length}]"
    wanted = str(dtype).removeprefix("torch.")
    if value.dtype != dtype or value.ndim != 1 or length not in (None, len(value)):
        given = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        yield f"{name} as {given} where {wanted} {shape} was asked for"
    if value.device not in ((device, HOST) if name == "kept" else (device,)):
        yield f"{name} on {value.device} where the tokens are on {device}"


def tokens_before_inflection(selector: Selector, tokens: Tokens, keep: int) -> int:
    """Return how many tokens `selector` keeps by the curve of its scores (arXiv 2409.01162): at most `keep`."""
    min_keep = min(keep, keep_count(AUTO_LEAST, len(tokens.unit_to_row)))
    return min(keep, max(min_keep, inflection(call(selector.package, selector.scores, tokens))))


def inflection(scores: torch.Tensor) -> int:
    """Return how many of `scores` (float `[N]`) lie before the inflection point of the sorted curve; N if it has none."""
    curve = scaled(scores.float().sort(descending=True).values)
    line = 1 - arange_on(len(curve), curve.device) / max(1, len(curve) - 1)
    depth = snap(line - curve)
    if depth.max() <= 0 or curve[0] <= 0:
        return len(curve)
    return int(depth.argmax())
