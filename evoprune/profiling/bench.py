"""A benchmark in place: its rows, its models and its prepared clips; and one round, in which every row has a turn."""

import time
from collections.abc import Callable, Sequence
from itertools import product

from evoprune import methods
from evoprune.errors import ModelError, OutOfMemory
from evoprune.model.cost import matmul_rate
from evoprune.model.memory import memory_guard, shortage
from evoprune.model.sizes import PATCHES
from evoprune.pipeline.loading.model import LoadedModel
from evoprune.pipeline.recipes import of_model
from evoprune.profiling.clips import Clip, Frames, prepare
from evoprune.profiling.hugging_face import hugging_face_model
from evoprune.profiling.results import FULL, HUGGING_FACE, METHOD, Case, Row, Sample
from evoprune.profiling.runners import Turn, run_evoprune, run_hugging_face
from evoprune.profiling.settings import Settings
from evoprune.profiling.weights import quantized_models, working_memory
from evoprune.pruning.budget import keep_count
from evoprune.vision.devices import units_at_a_time
from evoprune.vision.tower import tower_shape

Source = Callable[[Case], Frames]
Progress = Callable[[str], None]


class Bench:
    """Rows, models and clips, ready to be measured.

    Args:
        source: makes the frames of a case.
        progress: called with a description of what comes next.
        rows: from `all_rows`, those that are prepared; None for all.
        now: a clock in seconds.

    Attributes:
        rows: case after case, in the order of their turns. A row that cannot run has an error.
        notes: remarks for the results.
        rates: floating-point operations a second in plain matrix products, one figure a measured round.
        took: seconds of the last turn of each row that has had one. `rate_took`: of the matrix products of a round.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cases: Sequence[Case],
        source: Source,
        settings: Settings,
        progress: Progress,
        rows: Sequence[Row] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ):
        self._loaded, self._settings, self._progress, self._now = loaded, settings, progress, now
        self._reference, model = hugging_face_model(loaded.model), loaded.model
        self.rows = all_rows(cases, settings) if rows is None else [*rows]
        self.rates: list[float] = []
        self.took: dict[Row, float] = {}
        self.rate_took = 0.0
        self._last: tuple[float, dict[Row, Sample]] = (0.0, {})  # of the last round
        cases = [case for case in cases if any(row.case == case for row in self.rows)]
        kinds = [kind for kind in settings.quantize if any(row.quantize == kind for row in self.rows)]
        needed = {c: working_memory(model.config, c, loaded.video, model.dtype.itemsize) for c in cases}
        self._models, missing, self.notes = quantized_models(loaded, kinds, max(needed.values()), progress)
        for row in self.rows:
            row.error = missing.get(row.quantize)
        self._clips: dict[tuple, Clip] = {}  # of a case, and of a case, method and budget where that acts on the input
        for case in cases:
            here = [row for row in self.rows if row.case == case]
            if short := shortage(needed[case], loaded.device):
                for row in here:
                    row.error = f"not run: {short}"
            else:
                with memory_guard("preprocess"):
                    self._prepare(case, here, source(case))
        # Large squares, and the tower's own widest product over as many rows as it computes at a time.
        sides, vision = (4096, 8192) if loaded.device.startswith("cuda") else (1024, 2048), model.config.vision_config
        at_once = min(units_at_a_time(model.device), max((clip.units for clip in self._clips.values()), default=1))
        widest = max(3 * vision.hidden_size, vision.intermediate_size)
        self._shapes = [*((side,) * 3 for side in sides), (PATCHES * at_once, vision.hidden_size, widest)]

    def run_round(self, title: str, before_turn: Callable[[], None] = lambda: None) -> None:
        """Gives every row a turn; `count` counts the round. In one that is interrupted, not every row has had its turn.

        Args:
            before_turn: called before each turn; it may take rows that have not had their turn out of `rows`.
        """
        begun = self._now()
        self._progress(f"{title}: matrix products")
        rate = matmul_rate(self._loaded.model.dtype, self._loaded.device, shapes=self._shapes)
        self.rate_took = self._now() - begun
        turns: dict[Row, Turn | str] = {}
        before_turn()
        while waiting := [row for row in self.rows if not row.error and row not in turns]:
            row, start = waiting[0], self._now()
            self._progress(f"{title}: {row.name}, {row.case}")
            try:
                turns[row] = self._run(row)
            except (ModelError, OutOfMemory) as problem:  # NaN or infinity, or no memory
                turns[row] = problem.message
            self.took[row] = self._now() - start
            before_turn()
        for row, turn in turns.items():
            if isinstance(turn, str):
                row.error, row.samples = turn, []
            else:
                row.counts = turn.counts
        self._last = rate, {row: turn.sample for row, turn in turns.items() if not row.error}

    def count(self) -> None:
        """Counts the last round as measured."""
        rate, samples = self._last
        for row, sample in samples.items():
            row.samples = [*row.samples, sample]
        self.rates.append(rate)

    def _prepare(self, case: Case, rows: Sequence[Row], frames: Frames) -> None:
        """Preprocesses a clip, once as it is and once for each method and budget that makes it smaller."""
        self._clips[case,] = prepare(self._loaded, *frames)
        for name, budget in {(row.method, row.budget) for row in rows if row.kind == METHOD}:
            method = self._settings.parse(name)
            if method.acts == "input":
                self._clips[case, name, budget] = prepare(self._loaded, *frames, method, budget)

    def _run(self, row: Row) -> Turn:
        settings, loaded = self._settings, self._loaded
        clip = self._clips.get((row.case, row.method, row.budget), self._clips[row.case,])
        if row.kind == HUGGING_FACE:
            return run_hugging_face(loaded, self._reference, clip, settings.new_tokens)
        method = settings.parse(row.method) if row.kind == METHOD else methods.parse(row.method)
        method = of_model(method, loaded.id, lambda: loaded.weights_fingerprint)
        model, keep = self._models[row.quantize], min(keep_count(row.budget, clip.whole), clip.units)
        plan = method.plan(tower_shape(model.model.model.visual), clip.grid, keep)
        return run_evoprune(model, clip, plan, method, row.budget, settings.new_tokens, settings.seed)


def all_rows(cases: Sequence[Case], settings: Settings) -> list[Row]:
    """The rows of all cases in the order of their turns. A method that prunes nothing is the budget of 1.0, always there."""
    named = {name: settings.parse(name) for name in settings.methods if name != "none"}
    full = 1.0 in settings.budgets or "none" in settings.methods
    made = []
    for case in cases:
        made += [Row(HUGGING_FACE, case), Row(FULL, case, method="none")]
        made += [Row(METHOD, case, method="none", quantize=q) for q in settings.quantize if full and q != "none"]
        made += [
            Row(METHOD, case, budget, name, quantize=kind)
            for budget, name, kind in product(settings.budgets, named, settings.quantize)
            if named[name].acts_at(budget)
        ]
    return made
