"""Which rows of a benchmark end within its time limit: by an estimate before anything is loaded, then corrected by each turn."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from timeit import repeat

import torch

from evoprune.bench.profiling.clips import case_grid, text_tokens
from evoprune.bench.profiling.results import FULL, HUGGING_FACE, METHOD, Row
from evoprune.bench.profiling.settings import Settings
from evoprune.errors import UsageError
from evoprune.methods.budget import keep_tokens, share_of
from evoprune.methods.chain import Pipeline
from evoprune.model.cost import EFFICIENCY, matmul_rate, prefill_flop, tower_flop
from evoprune.session.loading.found import DTYPES, FoundModel
from evoprune.video.info import VIDEO
from evoprune.vision.tower import tower_shape

LIBRARIES_S = 4.0  # to import transformers
# How often the bytes of weights are written until they are ready, roughly: made or read and packed; or quantised.
PASSES = {"none": 3, "int8": 20, "int4": 30}

Seconds = Callable[[Row], float]


@dataclass
class TimeLimit:
    """The seconds that a run may take since it `begun`, by the clock `now`; if not `firm`, at least what its least rows take."""

    seconds: float
    now: Callable[[], float] = time.perf_counter
    begun: float | None = None
    firm: bool = True

    def __post_init__(self):
        self.begun = self.now() if self.begun is None else self.begun

    @property
    def spent(self) -> float:
        return self.now() - self.begun

    @property
    def left(self) -> float:
        """Negative when the limit is over."""
        return self.seconds - self.spent


def fitting(rows: Sequence[Row], seconds: Seconds, left: float, kept: Collection[Row] = ()) -> list[Row]:
    """The rows that end in time, in their order, and those that are `kept`.

    The least of a case is Hugging Face, budget 1.0 and the first method. That of the fastest case is there in any case, another
    case if its least ends in time. Other rows follow in their order.
    """
    chosen, used = {*kept}, sum(map(seconds, kept))
    cases = [[row for row in rows if row.case == case] for case in dict.fromkeys(row.case for row in rows)]
    for number, here in enumerate(sorted(cases, key=lambda here: sum(map(seconds, _least(here))))):
        first = [row for row in _least(here) if row not in chosen]
        if number and used + sum(map(seconds, first)) > left:
            continue
        chosen |= {*first}
        used += sum(map(seconds, first))
        for row in here:
            if row not in chosen and used + seconds(row) <= left:
                chosen.add(row)
                used += seconds(row)
    return [row for row in rows if row in chosen]


def _least(rows: Sequence[Row]) -> list[Row]:
    method = next((row for row in rows if row.kind == METHOD and row.method != "none"), None)
    return [row for row in rows if row.kind in (HUGGING_FACE, FULL) or row is method]


def estimate(
    rows: Sequence[Row],
    settings: Settings,
    model: FoundModel,
    bind: Callable[[Pipeline], Pipeline] = lambda method: method,
) -> tuple[dict[Row, float], Callable[[Collection[str]], float]]:
    """Seconds of a turn of each row; and a function from quantisations of the weights to the seconds until the first turn.

    `bind` gives a method what belongs to the model (`pipeline.saved.with_recipe`).
    """
    config, limits, dtype, device = model.config, model.limits[VIDEO], DTYPES[model.dtype], str(model.device)
    text, parts = config.text_config, (model.tree, model.tree.model.language_model)
    tower = tower_shape(model.tree.model.visual)
    weights, language = (sum(w.numel() for w in part.parameters()) * dtype.itemsize for part in parts)
    rate, (written, read) = EFFICIENCY * matmul_rate(dtype, device), _memory_rates(device)

    def turn(row: Row) -> float:
        method = bind(settings.parse(row.method)) if row.kind == METHOD else Pipeline()
        grid = case_grid(row.case, limits)
        plan = method.plan(tower, grid, keep_tokens(row.budget, grid))
        words = text_tokens(config.vision_config, row.case, limits)
        prompt = method.prompt_work(text.num_hidden_layers, plan.keep, words, share_of(row.budget, [grid]))
        layers, windows = [*plan.layers, plan.rows], tower.windows(*plan.grid[1:])
        flop = tower_flop(config.vision_config, layers, plan.grid[0], windows) + prefill_flop(text, prompt)
        return flop / rate + (settings.new_tokens - 1) * language / read

    def preparing(quantizations: Collection[str]) -> float:
        quantized = sum(PASSES[name] * language for name in quantizations if name != "none")
        return LIBRARIES_S + (PASSES["none"] * weights + quantized) / written

    return {row: turn(row) for row in rows}, preparing


def _memory_rates(device: str, size: int = 2**26) -> tuple[float, float]:
    """Bytes a second that this machine writes into new memory, and that it reads; each the best of three."""

    def rate(make: Callable[[], torch.Tensor]) -> float:
        return size / min(repeat(lambda: make().view(-1)[-1].item(), number=1, repeat=3))  # `item` synchronises

    new = partial(torch.ones, size // 4, dtype=torch.float32, device=device)
    return rate(new), rate(new().sum)


def choose_rows(
    expected: Mapping[Row, float],
    quantizations: Sequence[str],
    preparing: Callable[[Collection[str]], float],
    limit: TimeLimit,
) -> list[Row]:
    """The rows of as many `quantizations` as can be prepared, as far as they end in time; `expected`, `preparing`: of `estimate`.

    If even the least does not, a limit that is not firm is raised. Raises UsageError: one that is firm.
    """
    for count in range(len(quantizations), 0, -1):
        prepared = [row for row in expected if row.quantize in ("none", *quantizations[:count])]
        left = limit.left - preparing(quantizations[:count])
        chosen = fitting(prepared, expected.__getitem__, left)
        missing = sum(expected[row] for row in chosen) - left
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


def trimmed(rows: Sequence[Row], took: Mapping[Row, float], estimated: Seconds, rounds: int, left: float) -> list[Row]:
    """The rows without those that come next and would not end in time; asked before each turn of the first round.

    `took`: seconds of rows that had their turn, by which other estimates are corrected. `rounds`: to end in time, with this one.
    """
    expected = sum(map(estimated, took))
    if not expected:
        return [*rows]
    scale = sum(took.values()) / expected

    def seconds(row: Row) -> float:
        if row.error:
            return 0.0
        return took[row] * (rounds - 1) if row in took else estimated(row) * scale * rounds

    done = [row for row in rows if row.error or row in took]
    fit = fitting(rows, seconds, left, done)
    late = list(takewhile(lambda row: row not in fit, (row for row in rows if row not in done)))
    return [row for row in rows if row not in late]


def left_out(asked: Sequence[Row], kept: Sequence[Row], limit: TimeLimit) -> list[str]:
    """A remark that names the rows that are missing; none where none are."""
    there, cases = {(row.name, row.case) for row in kept}, {row.case for row in kept}
    missing = [f"all rows of {case}" for case in dict.fromkeys(row.case for row in asked) if case not in cases]
    missing += [f"{row.name}, {row.case}" for row in asked if row.case in cases and (row.name, row.case) not in there]
    return [f"left out to end within {limit.seconds:g} s: {'; '.join(missing)}"] if missing else []
