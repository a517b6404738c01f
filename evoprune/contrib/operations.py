"""Operation pruning (zxcvfd13502/GSOP), which keeps all visual tokens but performs fewer operations on them, according to a recipe.

An operation is a triple (layer, group, kind). There are two groups of visual tokens: "all", and "rest", which excludes the most
important tokens (key tokens). An operation removed for "all" is also removed for "rest". If an operation is removed for a token,
the token keeps its previous state.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, product
from pathlib import Path
from typing import Any, Self

import torch

from evoprune.errors import UsageError
from evoprune.methods import Budget, Dropping, LanguageMethod, LanguagePlan, LayerState, Selection, nonzero_fixed
from evoprune.untrusted import read_object
from evoprune.util import cannot_read, missing_hint

KINDS = ("keys", "queries", "mlp")  # the operations of a layer: keys and values; queries and output; the MLP
# Groups of visual tokens: all tokens, and all tokens except key tokens.
ALL = "all"
REST = "rest"
KEY = 0.25  # fraction of the visual tokens that are key tokens
PLACE = 2 / 32  # fraction of the layers after which the key tokens are known
Operation = tuple[int, str, str]  # (layer, ALL or REST, kind)
Removed = frozenset[Operation]
SCHEMA = "evoprune/tune-operations@1"  # schema of the files written by `evoprune tune VIDEO... --operations -o FILE`
TUNE_HINT = "to create one: evoprune tune VIDEO... --operations -o FILE.json"


@dataclass(frozen=True)
class OperationPlan(LanguagePlan):
    """A plan in which layers may skip operations for all visual tokens or for all tokens except the most important (key) tokens."""

    # The number of key tokens. The method selects them on its first call, and all layers before that compute everything.
    key: int = 0
    gone: Removed = frozenset()  # removed operations; an operation removed for all tokens is also listed for the rest

    def computed(self, layer: int, kind: str) -> tuple[bool, bool]:
        """Return whether a layer computes an operation for key tokens, and whether it does so for all other tokens."""
        return (layer, ALL, kind) not in self.gone, (layer, REST, kind) not in self.gone

    @property
    def work(self) -> tuple[tuple[int, int, int], ...] | None:
        if not self.gone:
            return None
        counts = {
            (True, True): self.tokens,
            (True, False): self.key,
            (False, True): self.tokens - self.key,
            (False, False): 0,
        }
        return tuple(tuple(counts[self.computed(layer, kind)] for kind in KINDS) for layer in range(self.depth))


@dataclass(frozen=True)
class Recipe:
    """The order in which to remove a language model's operations, and the data needed to turn a budget into a plan.

    Raises:
        ValueError: If a value is out of range.
    """

    depth: int  # number of layers of the language model
    after: int  # number of initial layers that compute everything, before tokens are divided into groups
    key: float  # fraction of the visual tokens that are key tokens
    weights: tuple[float, ...]  # each operation's share of a layer's work on a token, in the order of `KINDS`
    steps: tuple[tuple[Operation, ...], ...]  # the operations removed in each step

    def __post_init__(self):
        if not (1 <= self.after <= self.depth and 0 < self.key < 1):
            raise ValueError("after must be from 1 to depth, and key between 0 and 1")
        if len(self.weights) != len(KINDS) or min(self.weights) <= 0:
            raise ValueError(f"weights must be {len(KINDS)} numbers above 0")
        if wrong := [operation for operation in chain(*self.steps) if tuple(operation) not in self._every]:
            raise ValueError(f"unknown operation {[*wrong[0]]}")

    @classmethod
    def read(cls, file: str) -> Self:
        """Read a recipe from a file written by `tune --operations`.

        Raises:
            UsageError: If the file cannot be read or does not contain a recipe.
        """
        try:
            content = read_object(Path(file))
            if content.get("schema") != SCHEMA or not content.get("complete"):
                raise ValueError(f"it is not a complete {SCHEMA} result")
            steps = tuple(tuple(tuple(operation) for operation in step["operations"]) for step in content["steps"])
            facts = content["recipe"]
            return cls(**facts | {"weights": tuple(facts["weights"])}, steps=steps)
        except OSError as problem:
            raise UsageError(cannot_read(file, problem, "the recipe "), missing_hint(file, TUNE_HINT)) from problem
        except (ValueError, KeyError, TypeError) as problem:
            raise UsageError(f"{file} is not a recipe of operations: {problem}", TUNE_HINT) from problem

    @property
    def _every(self) -> list[Operation]:
        return [*product(range(self.after, self.depth), (ALL, REST), sorted(KINDS))]

    @property
    def digest(self) -> str:
        """A string of 12 hex digits that identifies this recipe in reports."""
        return sha256(repr(self).encode()).hexdigest()[:12]

    def count(self, budget: float) -> int:
        """Return the smallest number of steps after which the remaining fraction of the work is at most `budget`, in (0, 1].

        If the budget cannot be met, this is the total number of steps.
        """
        fits = (count for count in range(len(self.steps)) if self.share(chain(*self.steps[:count])) <= budget)
        return next(fits, len(self.steps))

    def removed(self, budget: float) -> Removed:
        """Return the operations to remove for a budget in (0, 1]."""
        return frozenset(chain(*self.steps[: self.count(budget)]))

    def share(self, removed: Iterable[Operation]) -> float:
        """Return the fraction of the work on visual tokens that remains after removing operations.

        Attention and the first `after` layers are excluded from the work.
        """
        weight = dict(zip(KINDS, self.weights, strict=True))
        sizes = {ALL: self.key, REST: 1 - self.key}
        work = {op: weight[op[2]] * sizes[op[1]] for op in self._every}
        if not work:
            return 1.0
        gone = self._gone(removed)
        left = sum(own for op, own in work.items() if op not in gone)
        # The result is rounded so that, for example, fractions that should add up to a quarter fit into a budget of a quarter.
        return round(left / sum(work.values()), 9)

    def plan(self, tokens: int, removed: Iterable[Operation]) -> OperationPlan:
        """Return the plan for a prompt with this number of visual tokens.

        Each group of tokens is dropped after the last layer that reads its keys.
        """
        gone = self._gone(removed)
        key = Budget.count(self.key, tokens)
        if not gone:
            return OperationPlan(self.depth, tokens, ())
        end, rest_end = (_last_keys(gone, group, self.depth) + 1 for group in (ALL, REST))
        left = {}
        if rest_end < end and key < tokens:
            left[rest_end] = key
        if end < self.depth:
            left[end] = 0
        looks = tuple(sorted({self.after, *left}))
        return OperationPlan.of(self.depth, tokens, left, looks=looks, key=key, gone=gone)

    def _gone(self, removed: Iterable[Operation]) -> Removed:
        """Return all skipped operations, including operations whose results are never used.

        In addition to the operations from `closed`, this includes the queries and the MLP of the last layer that computes a group's
        keys, because only the keys are used there. The top layer is an exception: its queries and MLP are computed only for the
        last position, but are treated as computed, as in other methods.
        """
        gone = set(closed(removed, self.depth))
        for group in (ALL, REST):
            last = _last_keys(gone, group, self.depth)
            useless = {(last, group, kind) for kind in KINDS if kind != "keys"}
            if last == self.depth - 1:
                gone -= useless
            elif last >= self.after:
                gone |= useless
        return frozenset(gone)


def closed(removed: Iterable[Operation], depth: int) -> Removed:
    """Return `removed` and all operations removed as a consequence.

    An operation removed for all tokens is also removed for the rest. After the last layer that computes a group's keys, all of the
    group's operations are removed, because nothing reads their results.
    """
    gone = set(removed)
    gone |= {(layer, REST, kind) for layer, group, kind in gone if group == ALL}
    for group in (ALL, REST):
        gone |= {*product(range(_last_keys(gone, group, depth) + 1, depth), [group], KINDS)}
    return frozenset(gone)


def _last_keys(removed: Collection[Operation], group: str, depth: int) -> int:
    """Return the index of the last layer that computes keys for a group of tokens, or `depth` if no layer does."""
    return max((layer for layer in range(depth) if (layer, group, "keys") not in removed), default=depth)


@dataclass(frozen=True)
class Operations(LanguageMethod):
    """Operation pruning with a recipe, which is valid for only one model.

    Users set `recipe` to the path of a file written by `evoprune tune --operations -o FILE`.
    """

    name = "operations"
    source = "zxcvfd13502/GSOP"
    attends = "every"

    recipe: Recipe | None = None

    @property
    def args(self) -> dict[str, Any]:
        """The method's settings as shown in reports, with the recipe's digest in place of the recipe itself."""
        return super().args | {"recipe": self.recipe and self.recipe.digest}

    def drops(self, depth: int, tokens: int, budget: float) -> OperationPlan:
        recipe = self.recipe
        if recipe is None:
            raise UsageError("method operations needs a recipe", f"operations:recipe=FILE.json; {TUNE_HINT}")
        if recipe.depth != depth:
            raise UsageError(f"the recipe is for {recipe.depth} layers, but this model has {depth}", TUNE_HINT)
        return recipe.plan(tokens, recipe.removed(budget))

    def reading(
        self, model, budget: float, embeds: torch.Tensor, visual: torch.Tensor, *where: torch.Tensor
    ) -> Dropping:
        return _Grouped(self, self.plan_for(model, len(visual), budget), model, embeds, visual, *where)


class _Grouped(Dropping):
    """Prunes operations while the language model reads a prompt. Drops a group of tokens once no later layer reads its keys."""

    _key: torch.Tensor | None = None  # bool, True for key tokens among the remaining visual tokens; None until selected

    @property
    def work(self) -> tuple[tuple[int, int, int], ...]:
        return self._plan.work

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(keys for keys, _, _ in self.work)

    def before(self, layer: int, columns: int) -> tuple[tuple[torch.Tensor, int] | None, list[torch.Tensor]]:
        computed = [self._plan.computed(layer, kind) for kind in KINDS]
        if self._key is None or all(map(all, computed)):
            return None, []
        stays = (torch.where(self._key, *flags) for flags in computed)
        return None, [self._with_text(columns, *pair) for pair in zip(stays, self.work[layer], strict=True)]

    def _selected(self, state: LayerState) -> Selection | None:
        if self._key is None:
            kept = self._chosen(state, self._plan.key).kept
            self._key = torch.zeros_like(self._visual, dtype=torch.bool).index_fill_(0, kept, True)
        left = self._plan.left(state.after)
        if left == len(self._key):
            return None
        kept = nonzero_fixed(self._key, left)
        self._key = self._key[kept]
        return Selection(kept)
