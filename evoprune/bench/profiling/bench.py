"""A benchmark in place: its rows, its models and its prepared clips; and one round, in which every row has a turn."""

from collections.abc import Callable, Sequence
from itertools import product

from evoprune import methods
from evoprune.backend.devices import is_host, largest_chunk
from evoprune.bench.profiling.clips import Clip, Frames, case_grid, prepare
from evoprune.bench.profiling.hugging_face import fastest_attention, hugging_face_model
from evoprune.bench.profiling.results import FULL, HUGGING_FACE, METHOD, Case, Row
from evoprune.bench.profiling.runners import Turn, run_evoprune, run_hugging_face
from evoprune.bench.profiling.settings import Settings
from evoprune.bench.profiling.weights import quantized_models, working_memory
from evoprune.errors import ModelError, OutOfMemory, memory_guard, names_plugins
from evoprune.methods.plans import keep_tokens
from evoprune.model.config import PATCHES
from evoprune.model.cost import matmul_rate, shortage
from evoprune.session.loading.model import LoadedModel
from evoprune.vision.tower import tower_shape

Source = Callable[[Case], Frames]
Progress = Callable[[str], None]


class Bench:
    """Rows, models and clips, ready to be measured; rows that cannot run get an error. `source` makes the frames of a case."""

    def __init__(
        self, loaded: LoadedModel, rows: Sequence[Row], source: Source, settings: Settings, progress: Progress
    ):
        self._loaded, self._settings = loaded, settings
        model, attention = loaded.model, fastest_attention(loaded.model)
        self._reference = hugging_face_model(model, attention)
        names = [name for name in settings.quantize if any(row.quantize == name for row in rows)]
        cases = {case: [row for row in rows if row.case == case] for case in dict.fromkeys(row.case for row in rows)}
        needed = {c: working_memory(model.config, c, loaded.video, model.dtype.itemsize) for c in cases}
        self._models, missing, self.notes = quantized_models(loaded, names, max(needed.values()), progress)
        if not is_host(model.device):
            slow = ", whose tower loops over windows in Python; flash-attn, which does not, is not installed"
            self.notes.append(f"transformers runs {attention}{slow if attention == 'sdpa' else ''}")
        for row in rows:
            row.error = missing.get(row.quantize)
        self._clips: dict[tuple, Clip] = {}  # of a case, and of a case, method and budget where that acts on the input
        for case, here in cases.items():
            if short := shortage(needed[case], loaded.device):
                for row in here:
                    row.error = f"not run: {short}"
            else:
                with memory_guard("preprocess"):
                    frames = source(case)
                    self._clips[case,] = prepare(loaded, *frames)
                    for name, budget in {(row.method, row.budget) for row in here if row.kind == METHOD}:
                        if (method := settings.parse(name)).acts == "input":
                            self._clips[case, name, budget] = prepare(loaded, *frames, method, budget)
        # Large squares, and the tower's own widest product over as many rows as it computes at a time.
        sides, vision = (4096, 8192) if loaded.device.startswith("cuda") else (1024, 2048), model.config.vision_config
        chunk_units = min(largest_chunk(model.device), max((clip.units for clip in self._clips.values()), default=1))
        widest = max(3 * vision.hidden_size, vision.intermediate_size)
        self._shapes = [*((side,) * 3 for side in sides), (PATCHES * chunk_units, vision.hidden_size, widest)]

    def rate(self) -> float:
        """Floating-point operations a second in plain matrix products."""
        return matmul_rate(self._loaded.model.dtype, self._loaded.device, shapes=self._shapes)

    @names_plugins()
    def run(self, row: Row) -> Turn | str:
        """A turn of a row; or why it failed: NaN or infinity, or no memory."""
        settings, loaded = self._settings, self._loaded
        clip = self._clips.get((row.case, row.method, row.budget), self._clips[row.case,])
        try:
            if row.kind == HUGGING_FACE:
                return run_hugging_face(loaded, self._reference, clip, settings.new_tokens)
            method = settings.parse(row.method) if row.kind == METHOD else methods.parse(row.method)
            model, grid = self._models[row.quantize], case_grid(row.case, self._loaded.video)
            keep = min(keep_tokens(row.budget, grid), clip.units)
            plan = method.plan(tower_shape(model.model.model.visual), clip.grid, keep)
            return run_evoprune(model, clip, plan, method, row.budget, settings.new_tokens, settings.seed)
        except (ModelError, OutOfMemory) as problem:
            return problem.message


def all_rows(cases: Sequence[Case], settings: Settings) -> list[Row]:
    """The rows of all cases in the order of their turns. A method that prunes nothing is the budget of 1.0, always there."""
    named = {name: settings.parse(name) for name in settings.methods if name != "none"}
    full = 1.0 in settings.budgets or "none" in settings.methods
    made = []
    for case in cases:
        made += [Row(HUGGING_FACE, case), Row(FULL, case, method="none")]
        made += [Row(METHOD, case, method="none", quantize=q) for q in settings.quantize if full and q != "none"]
        made += [
            Row(METHOD, case, budget, name, quantize=quantize)
            for budget, name, quantize in product(settings.budgets, named, settings.quantize)
            if named[name].acts_at(budget)
        ]
    return made
