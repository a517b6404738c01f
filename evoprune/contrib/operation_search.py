"""The search for a recipe, which specifies the order in which the `operations` method (docs/methods.md) removes a model's
operations.

The order depends on how much each operation affects the output distribution. The search first removes as many operations in the
deepest layers as possible without changing the most likely choice for any token. It then removes operations one at a time, always
choosing the one with the smallest effect. The top layer never computes queries or the MLP for visual tokens.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, ClassVar, NamedTuple

from evoprune.contrib.operations import ALL, KEY, PLACE, REST, SCHEMA, Operation, Operations, Recipe, Removed, closed
from evoprune.errors import UsageError
from evoprune.methods import LanguagePlan, MethodChain
from evoprune.model import head_size

STEP = 0.3 / 15  # increase of the allowed loss per step, as a fraction of the loss with all operations removed
# Operation types, in the authors' order. If losses are equal, the last one is removed first.
ORDER = ("queries", "mlp", "keys")


class Loss(NamedTuple):
    """The effect of removing operations on the model's output.

    `kl` is the mean KL divergence in nats per token. `agree` is the fraction of tokens whose most likely choice is unchanged.
    """

    kl: float
    agree: float


class Step(NamedTuple):
    """Operations that are removed together, and the loss after removing them. The loss fields are None if not measured."""

    operations: tuple[Operation, ...]
    kl: float | None = None
    agree: float | None = None


def for_nothing(after: int, depth: int, lossless: Callable[[Removed], bool]) -> Removed:
    """Find the operations in the deepest layers whose removal does not change the model's output.

    Args:
        after: The number of initial layers that compute everything.
        depth: The number of layers of the language model.
        lossless: Returns True if removing the given operations leaves every token's most likely choice unchanged.
    """
    removed: Removed = frozenset()
    for group in (ALL, REST):
        last = depth - 1
        for kinds in (ORDER, ORDER[:2], ORDER[:1]):
            more = [removed | {*product(range(first, depth), [group], kinds)} for first in range(depth)]
            first = deepest(after, last, lambda first, more=more: lossless(more[first]))
            if first is not None:
                last = first
                removed = more[first]
            if last <= after:
                break
    return removed


def deepest(low: int, high: int, passes: Callable[[int], bool]) -> int | None:
    """Find the lowest layer from `low` to `high` that passes a test using binary search. Returns None if `high` fails the test."""
    if low > high or not passes(high):
        return None
    return low + bisect_left(range(low, high), True, key=passes)


def search(
    after: int,
    depth: int,
    measure: Callable[[Removed], Loss],
    found: list[Step],
    go_on: Callable[[], bool] = lambda: True,
) -> bool:
    """Find the order in which a `Recipe` removes operations, and append it to `found` step by step.

    Args:
        after: The number of initial layers that compute everything.
        depth: The number of layers of the language model.
        measure: Returns the loss with the given operations removed.
        found: The steps found so far, extended in place.
        go_on: Returns True if there is time for more measurements. Once time runs out, the remaining operations are ordered by
            their latest measurements.

    Returns:
        True if the order is complete, or False if time ran out before every operation had been measured once.
    """
    known: dict[Removed, Loss] = {}

    def loss(removed: Removed) -> Loss:
        if removed not in known:
            known[removed] = measure(removed)
        return known[removed]

    def add(operations: Removed, loss: Loss | None) -> None:
        found.append(Step(tuple(sorted(operations)), *(loss or ())))

    every = [*product(range(after, depth), (ALL, REST), ORDER)]
    removed = for_nothing(after, depth, lambda removed: loss(removed).agree == 1)
    add(removed, loss(removed))
    step = STEP * loss(frozenset(product(range(after, depth), [ALL], ORDER))).kl
    allowed = step
    scores = {}
    while left := [op for op in every if op not in removed and (op[0] < depth - 1 or op[2] == "keys")]:
        for op in left:
            if op not in scores:
                if not go_on():
                    return False
                scores[op] = loss(closed(removed | {op}, depth)).kl
        best = min(reversed(left), key=scores.__getitem__)
        then = closed(removed | {best}, depth)
        measured = loss(then) if go_on() else None
        if measured and step and measured.kl > allowed:
            allowed += step
            scores |= {op: loss(closed(removed | {op}, depth)).kl for op in left if go_on()}
        else:
            add(then - removed, measured)
            removed = then
    return True


@dataclass(frozen=True)
class _Trial(Operations):
    """The `operations` method with a fixed set of removed operations, independent of the budget."""

    removed: Removed = frozenset()

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return self.recipe.plan(tokens, self.removed)


class RecipeSearch:
    """Searches for the recipe of a language model, given the model's `TextConfig`.

    The attribute `found` contains the steps found so far, and `complete` indicates whether the order is complete.

    Raises:
        UsageError: If the language model has only one layer, or layers without attention.
    """

    schema: ClassVar[str] = SCHEMA

    def __init__(self, config):
        if config.linear_layers:
            problem = "operations need attention in every layer, but most layers of this model are Gated DeltaNets"
            raise UsageError(problem, "use a model with attention in all layers, such as Qwen3-VL")
        after = LanguagePlan.layers_before(PLACE, config.num_hidden_layers)
        if not after:
            raise UsageError("a language model with one layer has no operations to skip", "use a deeper model")
        self._blank = Recipe(config.num_hidden_layers, after, KEY, weights(config), ())
        self.found: list[Step] = []
        self.complete = False

    def run(self, measure: Callable[[MethodChain], tuple[float, float]], go_on: Callable[[], bool]) -> None:
        """Search until the order is complete, or until time runs out before every operation has been measured once.

        Args:
            measure: Takes a method that removes some operations, and returns the mean KL divergence and the fraction of tokens
                whose most likely choice is unchanged (see `Loss`).
            go_on: Returns True if there is time for more measurements.
        """
        blank = self._blank

        def loss(removed: Removed) -> Loss:
            return Loss(*measure(MethodChain(language=_Trial(recipe=blank, removed=removed))))

        self.complete = search(blank.after, blank.depth, loss, self.found, go_on)

    @property
    def left_out(self) -> int:
        """The number of operations removed so far."""
        return sum(len(step.operations) for step in self.found)

    @property
    def recipe(self) -> Recipe:
        return replace(self._blank, steps=tuple(step.operations for step in self.found))

    def document(self, budgets: Iterable[float]) -> dict[str, Any]:
        """Return the results so far as a JSON-serializable dict. Once they are `complete`, `Recipe.read` can read the resulting
        file."""
        return {
            "complete": self.complete,
            "rows": self._rows(budgets) if self.complete else [],
            "recipe": {name: value for name, value in asdict(self._blank).items() if name != "steps"},
            "steps": [step._asdict() for step in self.found],
        }

    def _rows(self, budgets: Iterable[float]) -> list[dict[str, Any]]:
        """Return a table row for each budget, with the number of removed operations and the resulting loss."""
        recipe = self.recipe
        rows = []
        for budget in sorted({*budgets}, reverse=True):
            removed = recipe.removed(budget)
            last = [Step((), 0.0, 1.0), *self.found][recipe.count(budget)]
            share = {"budget": budget, "share": recipe.share(removed), "operations": len(removed)}
            rows.append(share | {"kl": last.kl, "agree": last.agree})
        return rows


def weights(config) -> tuple[float, float, float]:
    """Return the fractions of a layer's work per token spent on keys and values, on queries and output, and on the MLP.

    The three fractions add up to 1. `config` is the model's `TextConfig`.
    """
    hidden = config.hidden_size
    keys = config.num_key_value_heads
    queries = config.num_attention_heads
    work = 2 * hidden * head_size(config) * keys, 2 * hidden * head_size(config) * queries
    work += (3 * hidden * config.intermediate_size,)
    return tuple(round(part / sum(work), 6) for part in work)  # rounded to the precision used in files
