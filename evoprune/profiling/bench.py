"""A benchmark in place: its rows, its models and its prepared clips; and one round, in which every row has a turn."""

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

    Attributes:
        rows: case after case, in the order of their turns. A row that cannot run has an error.
        notes: remarks for the results.
        rates: floating-point operations a second in plain matrix products, one figure a measured round.
    """

    def __init__(
        self, loaded: LoadedModel, cases: Sequence[Case], source: Source, settings: Settings, progress: Progress
    ):
        self._loaded, self._settings, self._progress = loaded, settings, progress
        self._reference = hugging_face_model(loaded.model)
        self.rows = [row for case in cases for row in _rows(case, settings)]
        self.rates: list[float] = []
        model = loaded.model
        needed = {c: working_memory(model.config, case_units(c, loaded.video), model.dtype.itemsize) for c in cases}
        self._models, missing, self.notes = quantized_models(loaded, settings.quantize, max(needed.values()), progress)
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

    def run_round(self, title: str, measured: bool) -> None:
        """Gives every row a turn. Only whole rounds count: in one that breaks off, not every row has had its turn."""
        self._progress(f"{title}: matrix products")
        rate = matmul_rate(self._loaded.model.dtype, self._loaded.device, shapes=self._shapes)
        taken = []
        for row in self.rows:
            if not row.error:
                self._progress(f"{title}: {row.name}, {row.case}")
                taken.append((row, *_take_turn(partial(self._run, row), self._loaded.device)))
        for row, counts, sample, error in taken:
            row.counts, row.error = counts or row.counts, error
            row.samples = [] if error else [*row.samples, sample] if measured else row.samples
        self.rates.extend([rate] if measured else [])

    def _of(self, case: Case) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def _prepare(self, case: Case, frames: Frames) -> None:
        """Preprocesses a clip, once as it is and once for each method and budget that makes it smaller."""
        self._clips[case] = prepare(self._loaded, *frames)
        for name, budget in {(row.method, row.budget) for row in self._of(case) if row.kind == METHOD}:
            method = methods.get(name, self._settings.method_args)
            if method.acts == "input":
                self._smaller[case, name, budget] = prepare(self._loaded, *frames, method, budget)

    def _run(self, row: Row, clock: Clock) -> Turn:
        settings = self._settings
        clip = self._smaller.get((row.case, row.method, row.budget), self._clips[row.case])
        if row.kind == HUGGING_FACE:
            return run_hugging_face(self._loaded, self._reference, clip, settings.new_tokens, clock)
        method = methods.get(row.method, settings.method_args if row.kind == METHOD else None)
        model, keep = self._models[row.quantize], min(keep_count(row.budget, clip.whole), clip.units)
        plan = method.plan(tower_shape(model.model.model.visual), clip.grid, keep)
        return run_evoprune(model, clip, plan, method, settings.new_tokens, settings.seed, clock)


def _rows(case: Case, settings: Settings) -> list[Row]:
    """The rows of a case in the order of their turns. A method that prunes nothing is the budget of 1.0, which is always there."""
    named = {name: methods.get(name, settings.method_args) for name in settings.methods if name != "none"}
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
    sample = Sample(spent["encode"], turn.prune, spent["prefill"], spent["generate"], peak_memory(device))
    return turn.counts, sample, None


def _matmul_shapes(loaded: LoadedModel, units: list[int]) -> list[tuple[int, int, int]]:
    """Large squares, and the tower's own widest product over as many rows as it computes at a time."""
    squares = (4096, 8192) if loaded.device.startswith("cuda") else (1024, 2048)
    at_once = min(units_at_a_time(loaded.model.device), max(units, default=1))
    rows, vision = PATCHES * at_once, loaded.model.config.vision_config
    widest = max(3 * vision.hidden_size, vision.intermediate_size)
    return [*((side, side, side) for side in squares), (rows, vision.hidden_size, widest)]
