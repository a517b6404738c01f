"""Which rows of a benchmark end within its time limit.

Before anything is loaded, the time of each row is estimated from its operations and a short measurement of this machine. From the
first turn on, the times that rows have really taken correct the estimates of the others.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import takewhile

import torch

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.pipeline import Pipeline
from evoprune.model.config import Config
from evoprune.model.cost import EFFICIENCY, matmul_rate, prefill_flop, tower_flop
from evoprune.model.weights import empty
from evoprune.profiling.clips import TEXT_AFTER, TEXT_BEFORE
from evoprune.profiling.results import FULL, HUGGING_FACE, METHOD, Row
from evoprune.profiling.settings import Settings
from evoprune.pruning.budget import keep_count
from evoprune.pruning.encoder_plan import EncoderPlan, full_plan
from evoprune.video.plan import InputLimits
from evoprune.vision.tower import tower_shape

LIBRARIES_S = 4.0  # to import transformers
# How often the bytes of weights are written until they are ready, roughly: made or read and packed; or quantised.
PASSES = {"none": 3, "int8": 20, "int4": 30}

Seconds = Callable[[Row], float]


class TimeLimit:
    """The time that a run may take, from its beginning on.

    Args:
        seconds: the limit.
        now: a clock in seconds.
        begun: when the run began, by this clock; None for now.
        firm: whether a run that would take longer is refused; otherwise the limit is raised.
    """

    def __init__(
        self,
        seconds: float,
        now: Callable[[], float] = time.perf_counter,
        begun: float | None = None,
        firm: bool = True,
    ):
        self.seconds, self.now, self.firm = seconds, now, firm
        self._begun = now() if begun is None else begun

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self.now() - self._begun

    @property
    def left(self) -> float:
        """Seconds until the limit; negative when it is over."""
        return self.seconds - self.spent


def fitting(rows: Sequence[Row], seconds: Seconds, left: float, kept: Collection[Row] = ()) -> list[Row]:
    """The rows that end in time, in their order.

    The least is Hugging Face, budget 1.0 and the first method of the fastest case, which are there in any case. Another case is
    there if these three of it end in time. The rows that remain follow in their order.

    Args:
        seconds: that a row takes.
        left: seconds for all of them.
        kept: rows that are there in any case.
    """
    chosen = {id(row) for row in kept}
    used = sum(seconds(row) for row in kept)
    least = [basis([row for row in rows if row.case == case]) for case in dict.fromkeys(row.case for row in rows)]
    for number, three in enumerate(sorted(least, key=lambda three: sum(map(seconds, three)))):
        missing = [row for row in three if id(row) not in chosen]
        cost = sum(map(seconds, missing))
        if number and used + cost > left:
            continue
        chosen |= {id(row) for row in missing}
        used += cost
        for row in rows:
            if row.case == three[0].case and id(row) not in chosen and used + seconds(row) <= left:
                chosen.add(id(row))
                used += seconds(row)
    return [row for row in rows if id(row) in chosen]


def basis(rows: Sequence[Row]) -> list[Row]:
    """Of the rows of a case those that the others are compared with, and the first method."""
    method = next((row for row in rows if row.kind == METHOD and row.method != "none"), None)
    return [row for row in rows if row.kind in (HUGGING_FACE, FULL) or row is method]


class Estimate:
    """Seconds of rows and of what comes before them, estimated before anything is loaded.

    Args:
        config: of the model.
        limits: of its videos.
        settings: what is measured.
        dtype, device: of the weights.
        bind: gives a method what belongs to the model (`pipeline.recipes.of_model`).
    """

    def __init__(
        self,
        config: Config,
        limits: InputLimits,
        settings: Settings,
        dtype: torch.dtype,
        device: str,
        bind: Callable[[Pipeline], Pipeline] = lambda method: method,
    ):
        self._config, self._limits, self._settings, self._bind = config, limits, settings, bind
        tree = empty(config)
        self._tower = tower_shape(tree.model.visual)
        self._weights = sum(weight.numel() for weight in tree.parameters()) * dtype.itemsize
        self._language = sum(weight.numel() for weight in tree.model.language_model.parameters()) * dtype.itemsize
        self._rate = EFFICIENCY * matmul_rate(dtype, device)
        self._written, self._read = _memory_rates(device)

    def row(self, row: Row) -> float:
        """Seconds of a turn."""
        vision, plan = self._config.vision_config, self._plan(row)
        count, height, width = plan.grid
        flop = tower_flop(vision, [*plan.layers, plan.rows], count, self._tower.windows(height, width))
        flop += prefill_flop(self._config.text_config, self._prompt(row, plan.keep))
        return flop / self._rate + (self._settings.new_tokens - 1) * self._language / self._read

    def _prompt(self, row: Row, tokens: int) -> int | list[tuple[int, ...]]:
        """Columns of the prompt, as `Pipeline.prompt_work`."""
        text, depth = TEXT_BEFORE + TEXT_AFTER, self._config.text_config.num_hidden_layers
        if row.kind != METHOD:
            return tokens + text
        method = self._bind(methods.parse(row.method, self._settings.method_args))
        return method.prompt_work(depth, tokens, text, row.budget)

    def preparing(self, kinds: Collection[str]) -> float:
        """Seconds until the first turn, with these quantisations of the weights."""
        quantized = sum(PASSES[kind] * self._language for kind in kinds if kind != "none")
        return LIBRARIES_S + (PASSES["none"] * self._weights + quantized) / self._written

    def _plan(self, row: Row) -> EncoderPlan:
        limits, case = self._limits, row.case
        grid = max(1, case.frames // limits.temporal_patch_size), case.height // limits.unit, case.width // limits.unit
        if row.kind != METHOD:
            return full_plan(self._tower, grid)
        method = methods.parse(row.method, self._settings.method_args)
        return method.plan(self._tower, grid, keep_count(row.budget, grid[0] * grid[1] * grid[2]))


def _memory_rates(device: str, size: int = 2**26) -> tuple[float, float]:
    """Bytes a second that this machine writes into new memory, and that it reads; each the best of three."""
    rates = []
    new = partial(torch.ones, size // 4, dtype=torch.float32, device=device)
    for pass_over in (new, new().sum):
        took = []
        for _ in range(3):
            start = time.perf_counter()
            pass_over().view(-1)[-1].item()  # waits for a GPU
            took.append(time.perf_counter() - start)
        rates.append(size / min(took))
    return rates[0], rates[1]


def choose_rows(rows: Sequence[Row], kinds: Sequence[str], estimate: Estimate, limit: TimeLimit) -> list[Row]:
    """The rows that are loaded for: those of as many quantisations as can be prepared, as far as they end in time.

    Where even the least does not, a limit that is not firm is raised to what that takes.

    Args:
        rows: all that are asked for.
        kinds: their quantisations.

    Raises:
        UsageError: the least that can be measured takes longer than a firm limit.
    """
    for count in range(len(kinds), 0, -1):
        prepared = [row for row in rows if row.quantize in ("none", *kinds[:count])]
        left = limit.left - estimate.preparing(kinds[:count])
        chosen = fitting(prepared, estimate.row, left)
        missing = sum(map(estimate.row, chosen)) - left
        if missing <= 0:
            return chosen
    needed = math.ceil(limit.seconds + missing)
    if not limit.firm:
        limit.seconds = float(needed)
        return chosen
    raise UsageError(
        f"the least that can be measured takes about {needed} s, the time limit is {limit.seconds:g} s",
        "raise --time-limit, or take fewer or smaller frames (--frames, --size) or a smaller model (-m)",
    )


def trimmed(rows: Sequence[Row], took: Mapping[int, float], estimated: Seconds, rounds: int, left: float) -> list[Row]:
    """The rows without those that are next and would not end in time; asked before each turn of the first round.

    Args:
        rows: of the round.
        took: seconds of the rows that have had their turn, by `id`.
        estimated: of the others, before anything ran. What is wrong with it for the first is taken to be wrong for all.
        rounds: that are to end in time, this one included.
        left: seconds.
    """
    timed = [row for row in rows if id(row) in took]
    expected = sum(map(estimated, timed))
    if not expected:
        return [*rows]
    scale = sum(took[id(row)] for row in timed) / expected

    def seconds(row: Row) -> float:
        if row.error:
            return 0.0
        return took[id(row)] * (rounds - 1) if id(row) in took else estimated(row) * scale * rounds

    done = [row for row in rows if row.error or id(row) in took]
    fit = {id(row) for row in fitting(rows, seconds, left, done)}
    waiting = [row for row in rows if not row.error and id(row) not in took]
    late = {id(row) for row in takewhile(lambda row: id(row) not in fit, waiting)}
    return [row for row in rows if id(row) not in late]


def left_out(asked: Sequence[Row], kept: Sequence[Row], limit: TimeLimit) -> list[str]:
    """A remark that names the rows that are missing; none where none are."""
    there = {(row.name, row.case) for row in kept}
    cases = {row.case for row in kept}
    missing = [f"all rows of {case}" for case in dict.fromkeys(row.case for row in asked) if case not in cases]
    missing += [f"{row.name}, {row.case}" for row in asked if row.case in cases and (row.name, row.case) not in there]
    return [f"left out to end within {limit.seconds:g} s: {'; '.join(missing)}"] if missing else []
