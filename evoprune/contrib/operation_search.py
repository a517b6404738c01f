"""One run of `evoprune tune --operations`: the order for leaving out operations (docs/methods.md, operations).

The order is found by the effect of each operation on the output distribution. First the deepest layers lose everything that costs
nothing, then one operation is removed after another. The top layer computes queries and MLP for no visual token.
"""

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from evoprune.bench import (
    BUDGETS,
    Column,
    Progress,
    Results,
    Run,
    TuneSettings,
    agreement_of,
    encode,
    failures,
    fitting,
    folded,
    heading,
    meanings,
)
from evoprune.contrib.operations import ALL, KEY, PLACE, REST, SCHEMA, Operation, Operations, Recipe, Removed, closed
from evoprune.errors import UsageError
from evoprune.methods import LanguagePlan, MethodChain, layers_before
from evoprune.model import head_size
from evoprune.report import rounded
from evoprune.session import ModelDescription, PruneOptions, Session
from evoprune.util import counted

STEP = 0.3 / 15  # step of the allowed loss, as a share of the loss with everything removed
# Kinds in the order that the authors' code tries them. Among equal losses, the last one is removed first.
ORDER = ("queries", "mlp", "keys")


class Loss(NamedTuple):
    """The cost of a removal. `kl`: mean KL in nats per token. `agree`: share of tokens with the same first choice."""

    kl: float
    agree: float


class Step(NamedTuple):
    """Operations that are removed together, and the loss afterwards, or None if it was not measured."""

    operations: tuple[Operation, ...]
    kl: float | None = None
    agree: float | None = None


def for_nothing(after: int, depth: int, lossless: Callable[[Removed], bool]) -> Removed:
    """Return the operations of the deepest layers that can be removed without a loss."""
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
    """Return the lowest layer from `low` to `high` that passes, by binary search, or None if `high` does not pass."""
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
    """Find the order for a `Recipe`, appending to `found` step by step.

    Args:
        measure: Returns the loss with some operations removed.
        go_on: Whether there is time for more measurements. If not, the remaining operations follow by their latest measurement.

    Returns:
        True if the order is complete; False if time ran out before every operation had been measured once.
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


def _if_measured(form: str, row: dict[str, Any]) -> str:
    """Format the loss of a row, or return a dash if it was not measured."""
    return "-" if row["kl"] is None else form.format(**row)


BUDGET: Column[dict[str, Any]] = Column("", lambda row: f"-b {row['budget']:g}")
COLUMNS: list[Column[dict[str, Any]]] = [
    Column(
        "work",
        lambda row: f"{100 * row['share']:.1f}%",
        "work: what is left of the work on visual tokens in the layers that leave some out",
    ),
    Column("operations", lambda row: f"{row['operations']:,}", "operations: left out", drop=1),
    Column(
        "KL",
        partial(_if_measured, "{kl:.3f}"),
        "KL: mean of KL(unpruned, pruned) in nats a token; -: not measured",
    ),
    Column("agree", partial(_if_measured, "{agree:.1%}"), "agree: tokens with the same first choice", drop=2),
]


@dataclass
class OperationResults(Results):
    """A document in the schema of recipes. `Recipe.read` can read it if the recipe is complete."""

    found: dict[str, Any]

    def document(self) -> dict[str, Any]:
        return rounded(self.found)

    def table(self, width: int) -> str:
        """Return a table of the operations that the recipe removes at each budget."""
        found = self.document()
        lines = heading(found, width)
        if found["rows"]:
            drawn, columns = fitting(found["rows"], [BUDGET, *COLUMNS], width)
            lines += ["", *drawn, "", *folded([meanings(columns)], width)]
        else:
            lines.append("no recipe was found: too little time")
        lines += failures(found)
        if found["error"]:
            lines += folded([f"{found['error']['message']}: not everything was measured"], width)
        if found["complete"]:
            lines += ["", "the file of -o is the recipe: --method operations:recipe=FILE"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Trial(Operations):
    """The method with a fixed set of operations removed, whatever the budget."""

    removed: Removed = frozenset()

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return self.recipe.plan(tokens, self.removed)


class OperationTuning(Run):
    """Finds a recipe. The settings `agree` and `methods` are ignored. `found` is the order so far, and all of it if `complete`."""

    schema = SCHEMA
    results_of = OperationResults

    def __init__(self, settings: TuneSettings, now: Callable[[], float] = time.perf_counter):
        super().__init__(settings, now)
        self.found: list[Step] = []
        self.complete = False
        self._measured = 0
        self._blank: Recipe | None = None

    def load(self, progress: Callable[[int, int], None] | None = None, model: ModelDescription | None = None) -> None:
        """Load the model. Raises the errors of `Run.load`, and UsageError if the language model has a single layer."""
        super().load(progress, model)
        text = self.loaded.model.config.text_config
        after = layers_before(PLACE, text.num_hidden_layers)
        if not after:
            raise UsageError("a language model with one layer has no operations to leave out", "take a deeper model")
        self._blank = Recipe(text.num_hidden_layers, after, KEY, weights(text), ())

    @property
    def has_results(self) -> bool:
        return bool(self.found)

    def run(self, progress: Progress = lambda *what: None, note: Callable[[str], None] = lambda what: None) -> None:
        """Answer in full, then search until the order is complete or the time is over. Otherwise like `Tuning.run`."""
        videos = self.answer(progress)
        settings = self.settings
        asked = []
        full = Session(self.loaded, PruneOptions(1.0, "none", seed=settings.seed).config())
        for number, answers in enumerate(videos):
            progress("encoding, video", number, len(videos))
            asked.append((encode(full, answers.path, settings.sampling)[0], answers.references))
        self.answering.close()

        def measure(removed: Removed) -> Loss:
            self._measured += 1
            left_out = sum(len(step.operations) for step in self.found)
            progress(f"measurement {self._measured}, {counted(left_out, 'operation')} left out")
            method = MethodChain(language=_Trial(recipe=self._blank, removed=removed))
            session = replace(full, pruning=replace(full.pruning, method=method))
            pruned = [(video.with_session(session), references) for video, references in asked]
            results = [agreement_of(given, video) for video, references in pruned for given in references]
            kl = np.concatenate([result.kl.numpy() for result in results])
            return Loss(float(kl.mean()), sum(int(result.agrees.sum()) for result in results) / len(kl))

        blank = self._blank
        self.complete = search(blank.after, blank.depth, measure, self.found, lambda: self.limit.left > 0)
        if not self.complete:
            note(f"{self._measured} measurements took all the time: too little to order the operations (--time-limit)")

    @property
    def recipe(self) -> Recipe:
        return replace(self._blank, steps=tuple(step.operations for step in self.found))

    def document(self, error: dict | None = None) -> dict[str, Any]:
        """Return the results so far, for JSON. `Recipe.read` reads them if `complete`.

        Args:
            error: The error that cut the run short, or None.
        """
        facts = None
        if self._blank:
            facts = {name: value for name, value in asdict(self._blank).items() if name != "steps"}
        return {
            **self.facts(),
            "measurements": self._measured,
            "complete": self.complete,
            "rows": self._rows() if self.complete else [],
            "recipe": facts,
            "steps": [step._asdict() for step in self.found],
            "error": error,
        }

    def _rows(self) -> list[dict[str, Any]]:
        """Return the removed operations and their cost for each budget."""
        recipe = self.recipe
        rows = []
        for budget in sorted({*(self.settings.budgets or BUDGETS)}, reverse=True):
            removed = recipe.removed(budget)
            last = [Step((), 0.0, 1.0), *self.found][recipe.count(budget)]
            share = {"budget": budget, "share": recipe.share(removed), "operations": len(removed)}
            rows.append(share | {"kl": last.kl, "agree": last.agree})
        return rows


def weights(config) -> tuple[float, float, float]:
    """Return the shares of a layer's work per token for keys and values, for queries and output, and for the MLP.

    `config` is a `TextConfig`.
    """
    hidden = config.hidden_size
    keys = config.num_key_value_heads
    queries = config.num_attention_heads
    work = 2 * hidden * head_size(config) * keys, 2 * hidden * head_size(config) * queries
    work += (3 * hidden * config.intermediate_size,)
    return tuple(round(part / sum(work), 6) for part in work)  # rounded as in files
