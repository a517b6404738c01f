"""One run of `evoprune tune --operations`: full answers, the search, and the document of results (`evoprune/tune-operations@1`)."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import evoprune
from evoprune.errors import UsageError
from evoprune.evaluation.frames import SharedFrames
from evoprune.methods.operations import KEY, PLACE, Operations
from evoprune.methods.pipeline import Pipeline
from evoprune.pipeline import recipes
from evoprune.pipeline.agreement import Reference, agreement
from evoprune.pipeline.answering import EncodedVideo
from evoprune.pipeline.engine import make_engine
from evoprune.pipeline.loading.model import LoadedModel, load_model
from evoprune.pipeline.options import PruneOptions
from evoprune.pipeline.recipes import KeptRecipe
from evoprune.pruning.language_plan import LanguagePlan, layers_before
from evoprune.pruning.operations import Recipe
from evoprune.text import counted
from evoprune.tuning.candidates import BUDGETS
from evoprune.tuning.full_answers import Answering, Progress, encode
from evoprune.tuning.operations import Found, Loss, Removed, search
from evoprune.tuning.run import SHARE_OF_FULL, Settings, run_facts


@dataclass(frozen=True)
class _Trial(Operations):
    """Without some operations, whatever the budget."""

    removed: Removed = field(default=frozenset(), metadata={"of_model": True})

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return self.recipe.plan(tokens, self.removed)


class OperationTuning:
    """Construct it, `load` a model, `run`. The results are in `document`, at any time.

    Args:
        settings: the videos, questions and time; `agree` and `methods` are not read.
        now: a clock in seconds.

    Attributes:
        found: the order so far. `complete`: whether it holds all operations.
        loaded: the model; None before `load`.
    """

    def __init__(self, settings: Settings, now: Callable[[], float] = time.perf_counter):
        self.settings, self._now, self._begun = settings, now, now()
        self.found, self.complete = Found([], []), False
        self.loaded: LoadedModel | None = None
        self._answering: Answering | None = None
        self._blank: Recipe | None = None
        self._measured = 0

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Raises what `load_model` raises. UsageError: the language model has a single layer."""
        self.loaded = load_model(self.settings.model, to_answer=True, progress=progress)
        text = self.loaded.model.config.text_config
        after = layers_before(PLACE, text.num_hidden_layers)
        if not after:
            raise UsageError("a language model with one layer has no operations to leave out", "take a deeper model")
        self._blank = Recipe(text.num_hidden_layers, after, KEY, weights(text), ())

    schema: ClassVar[str] = "evoprune/tune-operations@1"

    @property
    def has_results(self) -> bool:
        """Whether anything was found."""
        return bool(self.found.steps)

    @property
    def worth_saving(self) -> bool:
        """Whether the recipe serves every budget."""
        return self.complete

    @property
    def left_s(self) -> float:
        """Seconds until the time limit."""
        return self.settings.time_limit_s - (self._now() - self._begun)

    def run(self, progress: Progress = lambda what: None, note: Progress = lambda what: None) -> None:
        """Answers in full, then searches until the order is complete or the time is over.

        Args:
            progress: called with what comes next.
            note: called with a sentence that is to be read at once.

        Raises:
            VideoError, ModelError, OutOfMemory: of the first video, if none can be answered. Others are left out.
        """
        settings = self.settings
        full = make_engine(self.loaded, PruneOptions(1.0, "none", seed=settings.seed))
        seconds = SHARE_OF_FULL * settings.time_limit_s
        self._answering = Answering(full, settings.sampling, settings.questions, seconds, self._now)
        self._answering.answer(settings.videos, progress)
        asked: list[tuple[EncodedVideo, tuple[Reference, ...]]] = []
        for made in self._answering.made:
            progress(f"encoding video {len(asked) + 1} of {len(self._answering.made)}")
            asked.append((encode(full, made.path, settings.sampling, SharedFrames())[0], made.references))

        def measure(removed: Removed) -> Loss:
            self._measured += 1
            progress(f"measurement {self._measured}, {counted(sum(map(len, self.found.steps)), 'operation')} left out")
            engine = replace(full, method=Pipeline(language=_Trial(recipe=self._blank, removed=removed)))
            each = [
                agreement(given, other)
                for video, references in asked
                for other in [video.with_engine(engine)]
                for given in references
            ]
            kl = np.concatenate([one.kl.numpy() for one in each])
            return Loss(float(kl.mean()), sum(int(one.agrees.sum()) for one in each) / len(kl))

        blank = self._blank
        self.complete = search(blank.after, blank.depth, measure, self.found, lambda: self.left_s > 0)
        if not self.complete:
            note(f"{self._measured} measurements took all the time: too little to order the operations (--time-limit)")

    @property
    def recipe(self) -> Recipe:
        """What has been found so far."""
        return replace(self._blank, steps=tuple(self.found.steps))

    def save(self) -> Path:
        """Saves the recipe for this model's weights, where the method `operations` finds it; returns its path.

        Raises:
            UsageError: it cannot be written, or the weights cannot be identified.
        """
        answering = self._answering
        kept = KeptRecipe(
            recipe=asdict(self.recipe),
            kl=[loss and loss.kl for loss in self.found.losses],
            agree=[loss and loss.agree for loss in self.found.losses],
            model=self.loaded.id,
            created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            videos=len(answering.made),
            questions=answering.asked,
            tokens=sum(full.tokens for full in answering.made),
            version=evoprune.__version__,
        )
        return recipes.save(self.loaded.weights_fingerprint, kept)

    def document(self, error: dict | None = None) -> dict[str, Any]:
        """The results so far, as plain data for JSON; `error` is what cut the run short."""
        steps = zip(self.found.steps, self.found.losses, strict=True)
        return {
            **run_facts(self.loaded, self.settings, self._answering, self._now() - self._begun),
            "measurements": self._measured,
            "complete": self.complete,
            "rows": self._rows() if self.complete else [],
            "steps": [
                {"operations": list(map(list, step)), "kl": loss and loss.kl, "agree": loss and loss.agree}
                for step, loss in steps
            ],
            "error": error,
        }

    def _rows(self) -> list[dict[str, Any]]:
        """What each budget takes of the order, and what that cost."""
        recipe, rows = self.recipe, []
        for budget in sorted({*(self.settings.budgets or BUDGETS)}, reverse=True):
            removed, count = recipe.removed(budget), 0
            while frozenset().union(*recipe.steps[:count]) != removed:
                count += 1
            loss = self.found.losses[count - 1] if count else Loss(0.0, 1.0)
            rows.append(
                {
                    "budget": budget,
                    "share": recipe.share(removed),
                    "operations": len(removed),
                    "kl": loss and loss.kl,
                    "agree": loss and loss.agree,
                }
            )
        return rows


def weights(config) -> tuple[float, float, float]:
    """What share of a layer's work on a token keys and values, queries and output, and the MLP are; `config`: a `TextConfig`."""
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    work = 2 * hidden * head * config.num_key_value_heads, 2 * hidden * hidden, 3 * hidden * config.intermediate_size
    return tuple(each / sum(work) for each in work)
