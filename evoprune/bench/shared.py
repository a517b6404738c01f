"""Helpers shared by `profile`, `eval`, `tune` and `verify`: time limits, rounds, sweeps, and a cache for the tower's rows."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from evoprune.backend import Device
from evoprune.methods import EncoderPlan, PruneConfig, SetAside
from evoprune.model import Clock
from evoprune.session import LoadedModel, OpenInput, PruneOptions
from evoprune.video import FrameChunk
from evoprune.vision import EncodedRows, encode_rows

T = TypeVar("T")
# Maximum number of cached encodings. This is enough for the selectors that follow `reuse` at three budgets, whether they need
# attention, keys, both or neither, even if other methods run in between.
MAX_ENCODINGS = 32


@dataclass
class TimeLimit:
    """A run's time limit in seconds. `begun` is the time at which the run started, on the clock `now`. None means now."""

    seconds: float
    now: Callable[[], float] = time.perf_counter
    begun: float | None = None

    def __post_init__(self):
        if self.begun is None:
            self.begun = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self.begun

    @property
    def left(self) -> float:
        """Remaining time in seconds, which is negative once the limit has been exceeded."""
        return self.seconds - self.spent


def model_and_machine(loaded: LoadedModel | None) -> dict[str, Any]:
    """Return a document's `model` and `env` fields, which describe the model and the machine. None if no model is loaded yet."""
    if loaded is None:
        return {"model": None, "env": None}
    return {"model": asdict(loaded.facts()), "env": asdict(Device(loaded.device).environment())}


# The kinds of rounds that `paced` yields.
WARM_UP = "warm-up"
ROUND = "round"
COUNTED = "counted"


def paced(
    run_round: Callable[[str, int], T], warmups: int, repetitions: int, limit: TimeLimit
) -> Iterator[tuple[str, T]]:
    """Run rounds for as long as the next one can be expected to finish in time, judging by the duration of the previous round.

    The first round always runs.

    Args:
        run_round: called with a title and a number of rounds. In the first call, this is the number of rounds that must finish in
            time, and the function may do less work so that they do. In all later calls it is 0.

    Yields:
        The kind of the round (`WARM_UP` or `ROUND`) and its result. If no measured round fits within the limit, the result of the
        last warm-up is yielded again, as `COUNTED`.
    """
    last = 0.0
    result = None
    measured = False
    titles = [(WARM_UP, n, warmups) for n in range(warmups)] + [(ROUND, n, repetitions) for n in range(repetitions)]
    for phase, number, wanted in titles:
        rounds = 1 if phase == ROUND else 2  # a warm-up must leave time for a measured round
        if result is None or limit.left >= last * rounds:
            begun = limit.spent
            if result is not None:
                rounds = 0
            result = run_round(f"{phase} {number + 1} of {wanted}", rounds)
            last = limit.spent - begun
            measured = phase == ROUND
            yield phase, result
    if not measured:
        yield COUNTED, result


def swept(names: Iterable[str], budgets: Sequence[float | str]) -> list[tuple[str, float | str]]:
    """Return all combinations of a method and a budget that prune anything, without duplicates.

    For the exceptions, see `PruneOptions.config`.
    """
    pairs = dict.fromkeys(product(names, budgets))
    return [(name, budget) for name, budget in pairs if name != "none" and PruneOptions(budget, name).config().prunes]


def after_tower_below(configs: Iterable[PruneConfig], device: str) -> int:
    """Return a size limit in units: on this device, a method prunes smaller inputs only after the tower. 0 means that none does."""
    return max((config.after_tower_below(torch.device(device)) for config in configs), default=0)


def after_tower_note(below: int) -> str:
    """Return a note about inputs that are pruned only after the tower, or "" if `below` (see `after_tower_below`) is 0."""
    if not below:
        return ""
    return (
        f"inputs of fewer than {below:,} visual tokens were pruned only after the tower, because of inner=auto on a GPU"
    )


class SharedRows:
    """A cache for the tower's rows of one video and one model, so that methods that act after the encoder can share these rows.

    `saved` is the time in seconds that the cache saved in the latest call, or 0 if the rows were not in the cache.
    """

    def __init__(self):
        self.saved = 0.0
        self._held: OrderedDict[tuple, tuple[EncodedRows, float]] = OrderedDict()

    def encode_rows(self, visual, patches: Iterable[torch.Tensor], plan: EncoderPlan, **options) -> EncodedRows:
        """Return the rows from the cache, or encode them with `vision.encoder.encode_rows`."""
        key = (_tower_work(plan), *sorted((name, value) for name, value in options.items() if name != "on_layer"))
        if key in self._held:
            for _ in patches:  # consume the patches anyway, because their reader counts damaged frames
                pass
            self._held.move_to_end(key)
            rows, self.saved = self._held[key]
        else:
            clock = Clock(visual.patch_embed.proj.weight.device)
            self.saved = 0.0
            start = clock.now()
            rows = encode_rows(visual, clock.each("wait", patches), plan, **options)
            self._held[key] = rows, clock.now() - start - clock.seconds["wait"]
            if len(self._held) > MAX_ENCODINGS:
                self._held.popitem(last=False)
        return replace(rows, plan=plan, timer=rows.timer.copy())  # each caller adds its own times


@dataclass(eq=False)
class SharedInput(OpenInput):
    """An input that gets its rows from the cache `shared_rows`."""

    shared_rows: SharedRows

    def run_tower(self, patches: Iterator[torch.Tensor], **options) -> EncodedRows:
        visual = self.session.loaded.model.model.visual
        return self.shared_rows.encode_rows(visual, patches, self.plan.encoder, **options)


class GreyInput(OpenInput):
    """An input that has a video's size and length, but contains only grey frames."""

    shares: ClassVar[bool] = False

    def frames(self, on_frames: Callable[[int], None]) -> Iterator[FrameChunk]:
        source = self.plan.source
        times_s = self.plan.sampling.times_s
        at_once = source.frames_at_once(self.plan.chunk_bytes)
        for first in range(0, len(times_s), at_once):
            times = tuple(times_s[first : first + at_once])
            yield FrameChunk(first, np.full((len(times), source.height, source.width, 3), 128, np.uint8), times)


def _tower_work(plan: EncoderPlan) -> tuple:
    """Return a cache key for the tower's rows.

    If the plan may select tokens inside the tower, the key is the whole plan. Otherwise the key consists of only those parts of the
    plan that affect the rows.
    """
    inside = plan.stages
    needs = frozenset()
    if plan.token_stage:
        inside = plan.stages[:-1]
        needs = plan.token_stage.selector.needs
    if any(not isinstance(stage.reduce, SetAside) for stage in inside):
        return (plan,)
    return plan.grid, plan.reuse, inside, needs, plan.prunes
