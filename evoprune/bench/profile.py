"""The code behind `evoprune profile`, which measures the speed of pruning methods. Random weights are sufficient.

`Profile` represents the whole run. `load` loads a model if it fits into memory. `Bench` contains the clips and the model with
plain, packed and quantized weights. `measure` runs the rounds, all in the same process. In each round, every result row gets one
turn, which is a call to `run_evoprune` or, for plain transformers, to `run_hugging_face`.
"""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import ceil, inf, prod
from pathlib import Path
from typing import NamedTuple

import torch

from evoprune.backend import (
    Attention,
    Device,
    Host,
    Packing,
    Quantization,
    cache_name,
    weights_bytes,
)
from evoprune.bench.clips import (
    AFTER_PAIR,
    BEFORE_PAIR,
    TEXT_AFTER,
    TEXT_BEFORE,
    UNIT,
    Clip,
    Frames,
    case_grid,
    prepare,
    synthetic_frames,
    text_tokens,
    video_frames,
)
from evoprune.bench.hugging_face import hugging_face_model
from evoprune.bench.profile_results import ProfileResults
from evoprune.bench.profile_rows import (
    FULL,
    HUGGING_FACE,
    METHOD,
    Case,
    Counts,
    ProfileRow,
    ProfileSettings,
    Sample,
    bound_of,
)
from evoprune.bench.shared import COUNTED, WARM_UP, TimeLimit, after_tower_below, after_tower_note, paced, swept
from evoprune.errors import ModelError, OutOfMemory, UsageError, memory_guard
from evoprune.language import GenerationOptions, LanguageModel, TokenStream, prune_prompt
from evoprune.methods import Budget, EncoderPlan, MethodChain, PruneConfig, TowerShape, arange_on
from evoprune.model import PATCHES, Clock, Config, Cost, Model, QwenVL, matmul_rate
from evoprune.session import (
    BUNDLED_CONFIGS,
    DTYPES,
    LoadedModel,
    ModelDescription,
    ModelOptions,
    calibrate,
    describe,
    load_model,
    weights_of,
)
from evoprune.video import InputLimits, Video
from evoprune.vision import encode_rows

Progress = Callable[[str], None]

# For estimating the duration of a run, measured with the 3B model's dimensions on a CPU.
SLOWER = 3.0  # time of a row, divided by its number of operations at the speed of plain matrix products
FIXED_SHARE = 0.2  # time of a pruned row relative to budget 1.0, in addition to its budget
RATE_S = 0.1  # time to measure the speed of matrix products of one shape, once in each round
LOAD_BYTES_PER_S = 2**28  # how fast random weights are generated and packed


class Profile:
    """A profiling run over clip sizes, methods, and budgets. Create an instance, check its `needs`, and then call `run`.

    Args:
        settings: The methods, budgets, and other settings.
        load_format: How to load the weights. None uses random weights if there is a bundled config with the model's name;
            otherwise, the model's own weights.
        exact: Whether to use `cases` unchanged. If False, they are sizes for units of `UNIT` pixels and are scaled so that the
            model has the same number of units.
        video: The properties of the video to take frames from, or None to use a synthetic clip.
        source: The name of the video in the results, or the type of synthetic clip.
        begun: The start time of the run, as returned by `time.perf_counter`. None means now.

    Raises:
        UsageError: If a method has invalid settings or is incompatible with the model.

    See `describe` for other exceptions.
    """

    def __init__(
        self,
        settings: ProfileSettings,
        model: ModelOptions,
        cases: Sequence[Case],
        *,
        load_format: str | None = None,
        exact: bool = True,
        video: Video | None = None,
        source: str = ProfileSettings.SYNTHETIC[0],
        begun: float | None = None,
    ):
        methods = [settings.config(name, 1.0).method for name in settings.methods]
        self.settings = settings
        self.limit = TimeLimit(settings.time_limit_s, begun=begun)
        model = replace(model, load_format=load_format or default_load_format(model.model), quantize="none")
        self.model = describe(model)
        for method in methods:
            self.model.check_method(method)
        unit = self.model.limits["video"].unit
        self.cases = list(cases)
        if not exact:
            self.cases = [case.of_units(unit / UNIT) for case in cases]
        self._about = {"video": source if video else None, "synthetic": None if video else source}
        self._frames = partial(video_frames, video) if video else partial(synthetic_frames, source, unit=unit)

    def needs(self) -> "Needs":
        """Estimate how much time and memory the run needs.

        Raises:
            UsageError: If the run would exceed the time limit.
        """
        needs = needs_of(self.model, self.cases, self.settings, self.limit.seconds)
        if needs.seconds > self.limit.left:
            total = needs.seconds + self.limit.spent
            alone = f"Hugging Face and budget 1.0 take at least {total:.0f} s on this machine with {self.model.id}"
            raise UsageError(
                f"{alone}, including imports, but --time-limit is {self.limit.seconds:g}",
                f"use --time-limit {2 * ceil(total)}, fewer or smaller frames (--frames, --size), or -m demo",
            )
        return needs

    def run(self, progress: Progress = lambda what: None) -> Iterator[ProfileResults]:
        """Load the model and measure it, yielding the results so far after each measured round. See `load` for exceptions."""
        progress("loading model")
        loaded = load(self.model, self.cases)
        yield from measure(
            loaded,
            self.cases,
            self._frames,
            self.settings,
            about=self._about,
            progress=progress,
            limit=self.limit,
        )

    def bench(self, progress: Progress = lambda what: None) -> tuple["Bench", list[ProfileRow]]:
        """Load the model, and return a `Bench` and its rows for measuring individual turns. See `load` for exceptions."""
        loaded = load(self.model, self.cases)
        rows = all_rows(self.cases, self.settings)
        return Bench(loaded, rows, self._frames, self.settings, progress), rows


def default_load_format(name: str) -> str:
    """Return "dummy" (random weights) if there is a bundled config with this name; otherwise, "auto" (the model's own weights)."""
    return "dummy" if name in BUNDLED_CONFIGS and not Path(name).is_dir() else "auto"


def load(model: ModelDescription, cases: Sequence[Case]) -> LoadedModel:
    """Load a model if there is enough memory for the smallest case.

    Raises:
        OutOfMemory: If there is not enough memory.

    See `case_grid` and `load_model` for other exceptions.
    """
    size = DTYPES[model.dtype].itemsize
    weights = Cost(model.config).parameters * size
    working = min(working_memory(model.config, case, model.limits["video"], size) for case in cases)
    stored = weights_of(model)
    if missing_memory := Device(model.device).shortage(weights + working):
        hint = f"use fewer or smaller frames (--frames, --size); {stored.what_fits(working, quantized=False)}"
        raise OutOfMemory(f"{model.id} at {min(cases)} {missing_memory}", hint, stage="load")
    loaded = load_model(model, pack=False)
    loaded.ready()
    return loaded


class Needs(NamedTuple):
    """The resources required by a profiling run.

    Attributes:
        memory: The memory in bytes that the run uses, including packed and quantized copies of the weights that fit into memory.
        seconds: A lower bound on the duration, in seconds.
        expected: An estimate of the duration on an idle machine, in seconds, including loading. The time limit is its upper bound.
    """

    memory: int
    seconds: float
    expected: float


def needs_of(model: ModelDescription, cases: Sequence[Case], settings: ProfileSettings, limit_s: float) -> Needs:
    """Estimate the memory for the largest case, and the time.

    The lower bound is the time to run Hugging Face transformers and budget 1.0 once on the first case: the number of operations
    divided by this machine's matrix product speed, which is measured for 0.1 s. It does not include loading, packing, or the
    pruning methods. The estimate includes them, and all rounds and cases.

    Raises:
        UsageError: If the device cannot be used.
    """
    device = weights_of(model).device
    config = model.config
    dtype = DTYPES[model.dtype]
    grid = case_grid(cases[0], model.limits["video"])
    units = prod(grid)
    windows = model.tower.windows(*grid[1:])
    cost = Cost(config)
    flop = cost.tower_flop([units] * (config.vision_config.depth + 1), grid[0], windows)
    prompt = units + text_tokens(config.vision_config, cases[0], model.limits["video"])
    flop += cost.prefill_flop(prompt)
    flop += (settings.new_tokens - 1) * cost.prefill_flop(1)
    seconds = 2 * flop / matmul_rate(dtype, str(device))
    shares = [Budget.of(budget).video for _, budget in swept(settings.methods, settings.budgets)]
    rows = 2 + sum(FIXED_SHARE + share for share in shares) * len(settings.quantize)
    frames = sum(prod(case_grid(case, model.limits["video"])) for case in cases) / units
    rounds = settings.warmups + settings.repetitions
    once = RATE_S * (len(Device(device).product_sides) + 1) + frames * rows / 2 * SLOWER * seconds
    expected = rounds * once + cost.parameters * dtype.itemsize / LOAD_BYTES_PER_S
    working = max(working_memory(config, case, model.limits["video"], dtype.itemsize) for case in cases)
    weights = all_weights_bytes(config, dtype, device, settings.quantize, working)
    return Needs(weights + working, seconds, min(expected, limit_s))


def all_weights_bytes(
    config: Config, dtype: torch.dtype, device: torch.device, quantize: Sequence[str], working: int
) -> int:
    """Predict how many bytes the weights and the copies made by `quantized_models` take. For the arguments, see there."""
    empty = QwenVL.empty(config).to(dtype)
    plain = total = sum(weight.nbytes for weight in empty.parameters())
    available = Device(device).available_memory()

    def free() -> float:
        return inf if available is None else available - total

    if Packing.supports(torch.empty(1, dtype=dtype, device=device)) and (part := packed_part(empty, free(), working)):
        total += sum(layer.weight.nbytes for layer in part.modules() if type(layer) is torch.nn.Linear)
    for name in quantize:
        if name != "none":
            needed = plain - Quantization(name).saved_bytes(empty)
            total += needed if needed + working <= free() else 0
    return total


def packed_part(model: QwenVL, free: float, working: int) -> torch.nn.Module | None:
    """Return the part of a model that can be packed next to the plain weights: the model, its tower, or None.

    Args:
        free: The available memory in bytes.
        working: The amount of memory, in bytes, to leave free for computation.
    """
    visual = model.model.visual
    tower = sum(weight.nbytes for weight in visual.parameters())
    language = sum(weight.nbytes for weight in model.model.language_model.parameters())
    for part, size in ((model, tower + 1.2 * language), (visual, tower)):
        if free > 1.1 * size + working:
            return part
    return None


def quantized_models(
    loaded: LoadedModel, names: Sequence[str], working: int, progress: Progress
) -> tuple[dict[str, LoadedModel], dict[str, str], list[str]]:
    """Prepare all quantized models that fit into memory.

    Args:
        names: The quantizations. "none" means an unquantized model, whose weights are packed if there is enough memory.
        working: The amount of memory, in bytes, to leave free for computation.

    Returns:
        The models keyed by quantization, the reasons for any missing quantizations, and notes for the results.
    """
    ours = loaded.model
    for name in names:
        Quantization(name).check(ours.device)
    # On devices without packing, the model may already have fused layers. They are used as they are.
    if Packing.supports(next(ours.parameters())):
        ours = ours.shared()
    notes = []
    missing = {}
    all_bytes = sum(weight.nbytes for weight in loaded.model.parameters())
    if Packing.supports(next(ours.parameters())):
        progress("packing weights")
        start = Device(ours.device).now()
        free = Device(loaded.device).available_memory()
        if packed := packed_part(ours, inf if free is None else free, working):
            Packing.now(packed)
        if packed is not ours:
            notes.append(
                "not enough memory to pack all weights next to those of Hugging Face, so ask is faster than these figures"
            )
        notes.append(_ready("packed", ours, start))
    models = {"none": replace(loaded, model=ours, weights_bytes=weights_bytes(ours))}
    for name in names:
        if name == "none":
            continue
        if missing_memory := Device(loaded.device).shortage(
            all_bytes - Quantization(name).saved_bytes(loaded.model) + working
        ):
            missing[name] = f"not run: in addition to the other weights, {name} {missing_memory}"
            continue
        start = Device(loaded.model.device).now()
        model = loaded.model.shared()
        title = f"quantizing to {name}"
        Quantization(name).apply(
            model, calibrate, lambda done, total, title=title: progress(f"{title}: {done} of {total}")
        )
        models[name] = replace(loaded, model=model, quantize=name, weights_bytes=weights_bytes(model))
        notes.append(_ready(name, model, start))
    if note := Device(loaded.device).peak_memory_note:
        notes.append(note)
    return models, missing, notes


def _ready(name: str, model: QwenVL, start: float) -> str:
    return (
        f"{name} weights: {weights_bytes(model) / 2**30:.1f} GiB, ready in {Device(model.device).now() - start:.1f} s"
    )


def working_memory(config: Config, case: Case, limits: InputLimits, bytes_each: int) -> int:
    """Estimate peak memory, in bytes and excluding the weights, for plain transformers, which needs more than any other row.

    `bytes_each` is the size of one weight. See `case_grid` for exceptions.
    """
    units = prod(case_grid(case, limits))
    prompt = units + text_tokens(config.vision_config, case, limits)
    return Cost(config).unpruned_memory(units, prompt, bytes_each)


class Turn(NamedTuple):
    """The result of running a row once: its counts, times, and generated tokens."""

    counts: Counts
    sample: Sample
    tokens: list[int]


def run_evoprune(loaded: LoadedModel, clip: Clip, plan: EncoderPlan, config: PruneConfig, new_tokens: int) -> Turn:
    """Run evoprune from patches to new tokens, pruning visual tokens according to `plan` and `config`."""
    model = loaded.model
    visual = model.model.visual
    method = config.method
    Device(loaded.device).reset_peak_memory()
    clock = Clock(torch.device(loaded.device))
    with clock.stage("encode"):
        question = None
        if method.reads_question:
            embed = model.model.language_model.embed_tokens
            question = embed(clip.ids[-TEXT_AFTER:].to(embed.weight.device))
        rows = encode_rows(visual, [clip.pixels], plan, normal=loaded.video.normal, seed=config.seed)
        encoded = rows.select_tokens(question)
    with clock.stage("prefill"):
        language = LanguageModel(model)
        prompt = prune_prompt(clip.ids, [clip.place], [encoded], clip.positions, language.embed)
        share = config.budget.share_of_all([clip.grid])
        dropping = language.dropping_for(method, share, [encoded], prompt)
        state = language.prefill(
            prompt.embeds,
            prompt.positions,
            clip.following,
            None,
            prompt.sizes,
            dropping,
            prompt.deepstack,
            prompt.ids,
        )
    with clock.stage("generate"):
        tokens = list(TokenStream(state, GenerationOptions(new_tokens), eos_ids=()))
    counts = _counts(model, clip, encoded.layers, len(encoded.rows), len(encoded.kept), len(prompt))
    if not dropping:
        return Turn(counts, _sample(loaded, clock, encoded.prune_seconds, 0.0), tokens)
    sample = _sample(loaded, clock, encoded.prune_seconds, dropping.timer.seconds())
    work = dropping.work and tuple((layer, *layer_work) for layer, layer_work in enumerate(dropping.work))
    counts = replace(counts, language_layers=tuple(enumerate(dropping.layers)), language_work=work)
    return Turn(counts, sample, tokens)


@torch.inference_mode()
def run_hugging_face(loaded: LoadedModel, reference, clip: Clip, new_tokens: int) -> Turn:
    """Run the tower and the language model of `reference`, a transformers model. Logits are computed only for the last token."""
    from transformers import DynamicCache

    Device(loaded.device).reset_peak_memory()
    clock = Clock(torch.device(loaded.device))
    text = reference.model.language_model
    device = clip.patches.device
    pairs, rows, columns = clip.grid
    grid_thw = torch.tensor([[pairs, 2 * rows, 2 * columns]], dtype=torch.int64, device=device)
    # Row 0 is the index in the prompt. Rows 1 to 3 are the positions in time, height, and width.
    positions = torch.cat([arange_on(len(clip.ids), "cpu")[None], clip.positions])[:, None].to(device)
    with clock.stage("encode"):
        encoded = reference.model.visual(clip.patches, grid_thw=grid_thw)
    with clock.stage("prefill"):
        embeds = text.embed_tokens(clip.ids.to(device))
        video = clip.place.columns.to(device)
        embeds[video] = encoded.pooler_output
        inner = {}
        if getattr(encoded, "deepstack_features", None):
            mask = torch.zeros_like(positions[0], dtype=torch.bool).index_fill_(1, video, True)
            inner = {"visual_pos_masks": mask, "deepstack_visual_embeds": encoded.deepstack_features}
        given = {"inputs_embeds": embeds[None], "position_ids": positions, **inner}
        cached = {cache_name(): DynamicCache(config=reference.config.text_config), "use_cache": True}
        hidden = text(**given, **cached)
        logits = reference.lm_head(hidden.last_hidden_state[:, -1])
    with clock.stage("generate"):
        tokens = [int(logits.argmax())]
        while len(tokens) < new_tokens:
            embeds = text.embed_tokens(torch.tensor([tokens[-1:]], dtype=torch.int64, device=device))
            position = torch.full((4, 1, 1), clip.following + len(tokens) - 1, dtype=torch.int64, device=device)
            position[0] = len(clip.ids) + len(tokens) - 1
            hidden = text(inputs_embeds=embeds, position_ids=position, **cached)
            tokens.append(int(reference.lm_head(hidden.last_hidden_state[:, -1]).argmax()))
    layers = [(layer, clip.units) for layer in range(len(reference.model.visual.blocks))]
    counts = _counts(loaded.model, clip, layers, clip.units, clip.units, len(clip.ids))
    return Turn(counts, _sample(loaded, clock), tokens)


def _sample(loaded: LoadedModel, clock: Clock, prune: float = 0.0, prefill_prune: float = 0.0) -> Sample:
    s = clock.seconds
    return Sample(s["encode"], prune, s["prefill"], s["generate"], Device(loaded.device).peak_memory(), prefill_prune)


def _counts(model: Model, clip: Clip, layers: list[tuple[int, int]], rows: int, tokens: int, prompt: int) -> Counts:
    windows = TowerShape.of_tower(model.model.visual).windows(*clip.grid[1:])
    flop = Cost(model.config).tower_flop([*(entered for _, entered in layers), rows], clip.grid[0], windows)
    share = sum(entered for _, entered in layers) / len(layers) / clip.unpruned
    return Counts(clip.unpruned, rows, share, tuple(layers), tokens, prompt, flop)


class Bench:
    """The models and clips of a profiling run, ready for measurement. An error is recorded for rows that cannot run.

    Args:
        source: A function that returns the frames of a case.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        rows: Sequence[ProfileRow],
        source: Callable[[Case], Frames],
        settings: ProfileSettings,
        progress: Progress,
    ):
        self._loaded = loaded
        self._settings = settings
        model = loaded.model
        attention, attention_note = Attention(model.device, model.dtype).of_transformers()
        self._reference = hugging_face_model(model, attention)
        names = [name for name in settings.quantize if any(row.quantize == name for row in rows)]
        cases = {case: [row for row in rows if row.case == case] for case in dict.fromkeys(row.case for row in rows)}
        needed = {c: working_memory(model.config, c, loaded.video, model.dtype.itemsize) for c in cases}
        self._models, missing, self.notes = quantized_models(loaded, names, max(needed.values()), progress)
        if attention_note:
            self.notes.append(attention_note)
        for row in rows:
            row.error = missing.get(row.quantize)
        self._clips: dict[tuple, Clip] = {}  # keyed by case or, for input methods, by case, method, and budget
        for case, here in cases.items():
            if short := Device(loaded.device).shortage(needed[case]):
                for row in here:
                    row.error = f"not run: {short}"
            else:
                with memory_guard("preprocess"):
                    frames = source(case)
                    self._clips[case,] = prepare(loaded, *frames)
                    for name, budget in {(row.method, row.budget) for row in here if row.kind == METHOD}:
                        if (config := settings.config(name, budget)).method.acts == "input":
                            self._clips[case, name, budget] = prepare(loaded, *frames, config)
        # The shapes of large square products, and of the tower's widest product with as many rows as the tower computes at a time.
        sides = Device(model.device).product_sides
        vision = model.config.vision_config
        piece_units = min(
            Device(model.device).piece_units, max((clip.units for clip in self._clips.values()), default=1)
        )
        widest = max(3 * vision.hidden_size, vision.intermediate_size)
        self._shapes = [*((side,) * 3 for side in sides), (PATCHES * piece_units, vision.hidden_size, widest)]

    def rate(self) -> float:
        """Measure this machine's speed of plain matrix products, in floating-point operations per second."""
        return matmul_rate(self._loaded.model.dtype, self._loaded.device, RATE_S, self._shapes)

    def run(self, row: ProfileRow) -> Turn | str:
        """Run a row once. If it fails because of NaN, infinity, or insufficient memory, the reason is returned instead."""
        settings = self._settings
        loaded = self._loaded
        clip = self._clips.get((row.case, row.method, row.budget), self._clips[row.case,])
        try:
            if row.kind == HUGGING_FACE:
                return run_hugging_face(loaded, self._reference, clip, settings.new_tokens)
            model = self._models[row.quantize]
            config = settings.config(row.method, row.budget)
            plan = config.plan(TowerShape.of_tower(model.model.model.visual), case_grid(row.case, self._loaded.video))
            return run_evoprune(model, clip, plan, config, settings.new_tokens)
        except (ModelError, OutOfMemory) as problem:
            return problem.message


def all_rows(cases: Sequence[Case], settings: ProfileSettings) -> list[ProfileRow]:
    """Return the rows of all cases, in execution order.

    There is always a row for budget 1.0, which also represents methods that don't prune.
    """
    pruned = [
        (budget, name, quantize)
        for each in settings.budgets
        for name, budget in swept(settings.methods, [each])
        for quantize in settings.quantize
    ]
    full = 1.0 in settings.budgets or "none" in settings.methods
    rows = []
    for case in cases:
        rows += [ProfileRow(HUGGING_FACE, case), ProfileRow(FULL, case, method="none")]
        rows += [ProfileRow(METHOD, case, method="none", quantize=q) for q in settings.quantize if full and q != "none"]
        rows += [ProfileRow(METHOD, case, budget, name, quantize=quantize) for budget, name, quantize in pruned]
    return rows


# The result of a round: the matrix product speed, and each row's turn or the reason why it failed.
Round = tuple[float, dict[ProfileRow, Turn | str]]


def measure(
    loaded: LoadedModel,
    cases: Sequence[Case],
    source: Callable[[Case], Frames],
    settings: ProfileSettings,
    *,
    about: dict | None = None,
    progress: Progress = lambda what: None,
    limit: TimeLimit | None = None,
) -> Iterator[ProfileResults]:
    """Run all rows in turn, one round after another, within the time limit.

    Args:
        source: A function that returns the frames of a case.
        about: Additional settings to record (`video` and `synthetic`).
        limit: The time limit for the whole run, which may have started earlier. The default, None, uses the limit from `settings`,
            starting now.

    Yields:
        The results so far, after each measured round. At least one round is measured.
    """
    limit = limit or TimeLimit(settings.time_limit_s)
    asked = all_rows(cases, settings)
    rows = [*asked]
    progress("preparing")
    notes = []
    if not Device(loaded.device).reset_peak_memory():
        notes.append("peak memory is for the whole process so far, because this system cannot measure it per row")
    if loaded.model.config.vision_config.traits.timestamps:
        more = BEFORE_PAIR + AFTER_PAIR
        notes.append(f"each frame pair of a clip adds {more} tokens for its time and markers")
    configs = [settings.config(row.method, row.budget) for row in rows if row.kind == METHOD]
    below = after_tower_below(configs, loaded.device)
    if any(prod(case_grid(case, loaded.video)) < below for case in cases):
        notes.append(after_tower_note(below))
    results = ProfileResults(
        model=replace(loaded.facts(), quantize="none"),
        weights_bytes=loaded.weights_bytes,
        env=Device(loaded.device).environment(),
        machine={
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "cores": Host().available_cores(),
        },
        settings={
            **(about or {}),
            **asdict(settings),
            "method_args": {},  # method settings are part of `methods`
            "text_tokens": TEXT_BEFORE + TEXT_AFTER,
        },
    )
    bench = Bench(loaded, rows, source, settings, progress)
    notes += bench.notes

    run_round = partial(_run_round, bench, rows, limit, progress)
    for phase, (rate, turns) in paced(run_round, settings.warmups, settings.repetitions, limit):
        for row, turn in turns.items():
            if isinstance(turn, str):
                row.error, row.samples = turn, []
            else:
                row.counts = turn.counts
                if phase != WARM_UP:
                    row.samples = [*row.samples, turn.sample]
        if phase == WARM_UP:
            results.warmups, results.warmup_seconds = results.warmups + 1, limit.spent
            continue
        if phase == COUNTED:
            results.warmups -= 1
            notes.append("measured without a warm-up, because a second round would have exceeded the time limit")
        results.rows = _with_bounds([replace(row) for row in rows])
        results.matmul_rates.append(rate)
        results.rounds, results.seconds = results.rounds + 1, limit.spent
        results.notes = [*notes, *_left_out(asked, rows, limit)]
        yield results


def _run_round(
    bench: Bench, rows: list[ProfileRow], limit: TimeLimit, progress: Progress, title: str, rounds: int
) -> Round:
    """Run every row once.

    If `rounds` is not 0, that many rounds, including this one, must finish within the time limit. Each row is assumed to take as
    long as the slowest row so far. If the rounds would not finish in time with this row, the row is removed from `rows`. In the
    first case, Hugging Face transformers, budget 1.0, and the first method are never removed.
    """
    begun = limit.now()
    progress(f"{title}: matrix products")
    rate = bench.rate()
    turns = {}
    slowest = 0.0
    method = next((row for row in rows if row.kind == METHOD and row.method != "none"), None)
    minimum = [row for row in rows if row.case == rows[0].case and (row.kind in (HUGGING_FACE, FULL) or row is method)]
    for row in [row for row in rows if not row.error]:
        start = limit.now()
        if rounds and row not in minimum and limit.left < rounds * slowest + (rounds - 1) * (start - begun):
            rows.remove(row)
            continue
        progress(f"{title}: {row.name}, {row.case}")
        turns[row] = bench.run(row)
        slowest = max(slowest, limit.now() - start)
    return rate, turns


def _left_out(asked: Sequence[ProfileRow], kept: Sequence[ProfileRow], limit: TimeLimit) -> list[str]:
    """Return a list with one note that names the removed rows, or an empty list if there aren't any."""
    there = {(row.name, row.case) for row in kept}
    cases = {row.case for row in kept}
    missing = [f"all rows of {case}" for case in dict.fromkeys(row.case for row in asked) if case not in cases]
    missing += [f"{row.name}, {row.case}" for row in asked if row.case in cases and (row.name, row.case) not in there]
    if not missing:
        return []
    return [f"left out to finish within {limit.seconds:g} s: {'; '.join(missing)}"]


def _with_bounds(rows: list[ProfileRow]) -> list[ProfileRow]:
    """Insert a bound before the methods at each budget, based on one of these methods. See `bound_of`.

    This is the first method that didn't fail. Methods that don't spend time in the language model are preferred, and so is the
    model without quantization, from which the bound's tower time comes.
    """

    def rank(row: ProfileRow) -> tuple[bool, bool]:
        return bool(MethodChain.parse(row.method).language), row.quantize != "none"

    bounded = []
    seen = set()
    full = None
    for row in rows:
        if row.kind == FULL:
            full = row
        if row.kind == METHOD and row.method != "none" and (row.case, row.budget) not in seen:
            seen.add((row.case, row.budget))
            like = [r for r in rows if (r.kind, r.case, r.budget) == (METHOD, row.case, row.budget) and not r.error]
            bounded.append(bound_of(full, min(like, key=rank, default=row)))
        bounded.append(row)
    return bounded
