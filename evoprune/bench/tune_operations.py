"""The code behind `evoprune tune --operations`, which finds a recipe for the `operations` method (see docs/methods.md)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from evoprune.bench.results import Column, Results, failures, fitting, folded, meanings
from evoprune.bench.tune import BUDGETS, Progress, Run, TuneSettings, encode
from evoprune.bench.tune_results import heading
from evoprune.contrib import RecipeSearch
from evoprune.methods import MethodChain
from evoprune.report import rounded
from evoprune.session import ModelDescription, PruneOptions, Session
from evoprune.util import counted


def _if_measured(form: str, row: dict[str, Any]) -> str:
    """Format the loss of a result row. Returns a dash if it was not measured."""
    return "-" if row["kl"] is None else form.format(**row)


BUDGET: Column[dict[str, Any]] = Column("", lambda row: f"-b {row['budget']:g}")
COLUMNS: list[Column[dict[str, Any]]] = [
    Column(
        "work",
        lambda row: f"{100 * row['share']:.1f}%",
        "work: share of the work on visual tokens that remains, in the layers that skip some of it",
    ),
    Column("operations", lambda row: f"{row['operations']:,}", "operations: number left out", drop=1),
    Column(
        "KL",
        partial(_if_measured, "{kl:.3f}"),
        "KL: mean of KL(unpruned, pruned) in nats per token; -: not measured",
    ),
    Column("agree", partial(_if_measured, "{agree:.1%}"), "agree: tokens with the same first choice", drop=2),
]


@dataclass
class OperationResults(Results):
    """The results of a recipe search. If the recipe is complete, `Recipe.read` can read the stored document."""

    found: dict[str, Any]

    def document(self) -> dict[str, Any]:
        return rounded(self.found)

    def table(self, width: int) -> str:
        """Return a table with the number of operations that the recipe removes at each budget, and the resulting loss."""
        found = self.document()
        lines = heading(found, width)
        if found["rows"]:
            drawn, columns = fitting(found["rows"], [BUDGET, *COLUMNS], width)
            lines += ["", *drawn, "", *folded([meanings(columns)], width)]
        else:
            lines.append("no recipe was found: the time was too short")
        lines += failures(found)
        if found["error"]:
            lines += folded([f"{found['error']['message']}: not everything was measured"], width)
        if found["complete"]:
            lines += ["", "the -o file is the recipe; use it with --method operations:recipe=FILE"]
        return "\n".join(lines) + "\n"


class OperationTuning(Run):
    """Finds a recipe for the `operations` method. The settings `agree` and `methods` are ignored."""

    schema = RecipeSearch.schema
    results_of = OperationResults

    def __init__(self, settings: TuneSettings, now: Callable[[], float] = time.perf_counter):
        super().__init__(settings, now)
        self.search: RecipeSearch | None = None  # None before `load`
        self._measured = 0

    def load(self, progress: Callable[[int, int], None] | None = None, model: ModelDescription | None = None) -> None:
        """Load the model. See `Run.load` and `RecipeSearch` for exceptions."""
        super().load(progress, model)
        self.search = RecipeSearch(self.loaded.model.config.text_config)

    @property
    def has_results(self) -> bool:
        return self.search is not None and bool(self.search.found)

    def run(self, progress: Progress = lambda *what: None, note: Callable[[str], None] = lambda what: None) -> None:
        """Answer with the unpruned model, then search until the recipe is complete or time runs out. See `Tuning.run`."""
        videos = self.answer(progress)
        settings = self.settings
        asked = []
        full = Session(self.loaded, PruneOptions(1.0, "none", seed=settings.seed).config())
        for number, answers in enumerate(videos):
            progress("encoding, video", number, len(videos))
            asked.append((encode(full, answers.path, settings.sampling)[0], answers.references))
        self.answering.close()

        def measure(method: MethodChain) -> tuple[float, float]:
            self._measured += 1
            progress(f"measurement {self._measured}, {counted(self.search.left_out, 'operation')} left out")
            session = replace(full, pruning=replace(full.pruning, method=method))
            pruned = [(video.with_session(session), references) for video, references in asked]
            results = [given.agreement(video) for video, references in pruned for given in references]
            kl = np.concatenate([result.kl.numpy() for result in results])
            return float(kl.mean()), sum(int(result.agrees.sum()) for result in results) / len(kl)

        self.search.run(measure, lambda: self.limit.left > 0)
        if not self.search.complete:
            note(
                f"{self._measured} measurements took all the time, so the operations were not ordered (raise --time-limit)"
            )

    def document(self, error: dict | None = None) -> dict[str, Any]:
        """Return the results so far as a JSON-serializable dict, which `Recipe.read` can read if the recipe is complete.

        Args:
            error: The error that ended the run early, or None.
        """
        found = {"complete": False, "rows": [], "recipe": None, "steps": []}
        if self.search:
            found = self.search.document(self.settings.budgets or BUDGETS)
        return {**self.facts(), "measurements": self._measured, **found, "error": error}
