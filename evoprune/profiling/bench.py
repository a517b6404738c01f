"""A benchmark in place: its rows, its models and its prepared clips; and one round, in which every row has a turn."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch

from evoprune import methods
from evoprune.errors import ModelError, OutOfMemory
from evoprune.model.clock import Clock
from evoprune.model.cost import matmul_rate
from evoprune.model.machine import peak_memory, reset_peak_memory
from evoprune.model.memory import memory_guard, shortage
from evoprune.model.sizes import PATCHES
from evoprune.pipeline.loading.model import LoadedModel
from evoprune.pipeline.recipes import of_model
from evoprune.profiling.clips import Clip, Frames, prepare
from evoprune.profiling.hugging_face import hugging_face_model
from evoprune.profiling.results import FULL, HUGGING_FACE, METHOD, Case, Counts, Row, Sample
from evoprune.profiling.runners import Turn, run_evoprune, run_hugging_face
from evoprune.profiling.settings import Settings
from evoprune.profiling.weights import case_units, quantized_models, working_memory
from evoprune.pruning.budget import keep_count
from evoprune.vision.devices import units_at_a_time
from evoprune.vision.tower import tower_shape

Source = Callable[[Case], Frames]
Progress = Callable[[str], None]


class Bench:
    """Rows, models and clips, ready to be measured.

    Args:
        loaded: the model.
        cases: the clips' sizes.
        source: makes the frames of a case.
        settings: what is swept.
        progress: called with a description of what comes next.
        rows: from `all_rows`, those that are prepared; None for all.
        now: a clock in seconds.

    Attributes:
        rows: case after case, in the order of their turns. A row that cannot run has an error.
        notes: remarks for the results.
        rates: floating-point operations a second in plain matrix products, one figure a measured round.
        took: seconds of the last turn of each row that has had one, by its `id`. `rate_took`: of the matrix products of a round.
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
        self._loaded, self._settings, self._progress = loaded, settings, progress
        self._reference = hugging_face_model(loaded.model)
        self.rows = all_rows(cases, settings) if rows is None else [*rows]
        self.rates: list[float] = []
        self.took: dict[int, float] = {}
        self.rate_took = 0.0
        self._now = now
        self._last: tuple[float, list[tuple[Row, Sample]]] = (0.0, [])  # of the last round
        cases = [case for case in cases if self._of(case)]
        kinds = [kind for kind in settings.quantize if any(row.quantize == kind for row in self.rows)]
        model = loaded.model
        needed = {c: working_memory(model.config, case_units(c, loaded.video), model.dtype.itemsize) for c in cases}
        self._models, missing, self.notes = quantized_models(loaded, kinds, max(needed.values()), progress)
        for row in self.rows:
            row.error = missing.get(row.quantize)
        self._clips: dict[Case, Clip] = {}
        self._smaller: dict[tuple[Case, str, float], Clip] = {}  # for methods that act on the input
        for case in cases:
            if short := shortage(needed[case], loaded.device):
                for row in self._of(case):
                    row.error = f"not run: {short}"
            else:
                with memory_guard("preprocess"):
                    self._prepare(case, source(case))
        self._shapes = _matmul_shapes(loaded, [clip.units for clip in self._clips.values()])

    def run_round(self, title: str, before_turn: Callable[[], None] = lambda: None) -> None:
        """Gives every row a turn; `count` counts the round. In one that breaks off, not every row has had its turn.

        Args:
            before_turn: called before each turn; it may take rows that have not had their turn out of `rows`.
        """
        begun = self._now()
        self._progress(f"{title}: matrix products")
        rate = matmul_rate(self._loaded.model.dtype, self._loaded.device, shapes=self._shapes)
        self.rate_took = self._now() - begun
        taken, turn = [], 0
        before_turn()
        while turn < len(self.rows):
            row, turn = self.rows[turn], turn + 1
            if row.error:
                continue
            start = self._now()
            self._progress(f"{title}: {row.name}, {row.case}")
            taken.append((row, *_take_turn(partial(self._run, row), self._loaded.device)))
            self.took[id(row)] = self._now() - start
            before_turn()
        for row, counts, _, error in taken:
            row.counts, row.error = counts or row.counts, error
            row.samples = [] if error else row.samples
        self._last = rate, [(row, sample) for row, _, sample, error in taken if not error]

    def count(self) -> None:
        """Counts the last round as measured."""
        rate, taken = self._last
        for row, sample in taken:
            row.samples = [*row.samples, sample]
        self.rates.append(rate)

    def _of(self, case: Case) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def _prepare(self, case: Case, frames: Frames) -> None:
        """Preprocesses a clip, once as it is and once for each method and budget that makes it smaller."""
        self._clips[case] = prepare(self._loaded, *frames)
        for name, budget in {(row.method, row.budget) for row in self._of(case) if row.kind == METHOD}:
            method = methods.parse(name, self._settings.method_args)
            if method.acts == "input":
                self._smaller[case, name, budget] = prepare(self._loaded, *frames, method, budget)

    def _run(self, row: Row, clock: Clock) -> Turn:
        settings = self._settings
        clip = self._smaller.get((row.case, row.method, row.budget), self._clips[row.case])
        if row.kind == HUGGING_FACE:
            return run_hugging_face(self._loaded, self._reference, clip, settings.new_tokens, clock)
        loaded, method = self._loaded, methods.parse(row.method, settings.method_args if row.kind == METHOD else None)
        method = of_model(method, loaded.id, lambda: loaded.weights_fingerprint)
        model, keep = self._models[row.quantize], min(keep_count(row.budget, clip.whole), clip.units)
        plan = method.plan(tower_shape(model.model.model.visual), clip.grid, keep)
        return run_evoprune(model, clip, plan, method, row.budget, settings.new_tokens, settings.seed, clock)


def all_rows(cases: Sequence[Case], settings: Settings) -> list[Row]:
    """The rows of all cases, in the order of their turns."""
    return [row for case in cases for row in _rows(case, settings)]


def _rows(case: Case, settings: Settings) -> list[Row]:
    """The rows of a case in the order of their turns. A method that prunes nothing is the budget of 1.0, which is always there."""
    named = {name: methods.parse(name, settings.method_args) for name in settings.methods if name != "none"}
    pruned = [
        Row(METHOD, case, budget, method, quantize=kind)
        for budget, method, kind in product(settings.budgets, named, settings.quantize)
        if named[method].acts_at(budget)
    ]
    full = 1.0 in settings.budgets or "none" in settings.methods
    quantized = [
        Row(METHOD, case, method="none", quantize=kind) for kind in settings.quantize if full and kind != "none"
    ]
    return [Row(HUGGING_FACE, case), Row(FULL, case, method="none"), *quantized, *pruned]


def _take_turn(run: Callable[[Clock], Turn], device: str) -> tuple[Counts | None, Sample | None, str | None]:
    """Counts and times of a run, or why it failed."""
    reset_peak_memory(device)
    clock = Clock(torch.device(device))
    try:
        turn = run(clock)
    except (ModelError, OutOfMemory) as problem:  # NaN or infinity, or no memory
        return None, None, problem.message
    spent = clock.seconds
    times = spent["encode"], turn.prune, spent["prefill"], spent["generate"]
    sample = Sample(*times, peak_memory(device), turn.prefill_prune)
    return turn.counts, sample, None


def _matmul_shapes(loaded: LoadedModel, units: list[int]) -> list[tuple[int, int, int]]:
    """Large squares, and the tower's own widest product over as many rows as it computes at a time."""
    squares = (4096, 8192) if loaded.device.startswith("cuda") else (1024, 2048)
    at_once = min(units_at_a_time(loaded.model.device), max(units, default=1))
    rows, vision = PATCHES * at_once, loaded.model.config.vision_config
    widest = max(3 * vision.hidden_size, vision.intermediate_size)
    return [*((side, side, side) for side in squares), (rows, vision.hidden_size, widest)]
