"""Helpers shared by `profile`, `eval`, `tune`, and `verify`: time limits, rounds, sweeps, and a cache for tower rows."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch

from evoprune.backend import Device
from evoprune.methods import EncoderPlan, PruneConfig, SetAside
from evoprune.model import Clock
from evoprune.session import LoadedModel, PruneOptions
from evoprune.video import FrameChunk, Plan
from evoprune.vision import TowerOutput, encode_rows

T = TypeVar("T")
# The maximum number of cached encodings. It is large enough for selectors after `reuse` at three budgets, whether they need
# attention, keys, both, or neither, even if other methods run in between.
MAX_ENCODINGS = 32


@dataclass
class TimeLimit:
    """A run's time limit in seconds. `begun` is the start time of the run, as returned by `now`. None means now."""

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
        """The remaining time in seconds, which is negative once the limit has been exceeded."""
        return self.seconds - self.spent


def model_and_machine(loaded: LoadedModel | None) -> dict[str, Any]:
    """Return the `model` and `env` fields of a results document. Both are None if no model has been loaded yet."""
    if loaded is None:
        return {"model": None, "env": None}
    return {"model": asdict(loaded.facts()), "env": asdict(Device(loaded.device).environment())}


# The types of rounds yielded by `paced`.
WARM_UP = "warm-up"
ROUND = "round"
COUNTED = "counted"


def paced(
    run_round: Callable[[str, int], T], warmups: int, repetitions: int, limit: TimeLimit
) -> Iterator[tuple[str, T]]:
    """Run warm-up and measured rounds until the time limit would be exceeded.

    The first round always runs. Each later round is assumed to take as long as the previous one, and runs only if it would finish
    in time.

    Args:
        run_round: A function called with a title and a number of rounds. In the first call, this is the number of rounds that must
            finish in time, and the function may do less work to achieve this. In all later calls, it is 0.

    Yields:
        The type of the round (`WARM_UP` or `ROUND`) and its result. If there is not enough time for a measured round, the last
        warm-up result is yielded again as `COUNTED`.
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
    """Return all distinct combinations of a method and a budget that prune any tokens.

    See `PruneOptions.config` for exceptions.
    """
    pairs = dict.fromkeys(product(names, budgets))
    return [(name, budget) for name, budget in pairs if name != "none" and PruneOptions(budget, name).config().prunes]


def after_tower_below(configs: Iterable[PruneConfig], device: str) -> int:
    """Return the number of units below which any method prunes inputs only after the vision tower on this device.

    Returns 0 if inputs of all sizes are treated the same.
    """
    return max((config.after_tower_below(torch.device(device)) for config in configs), default=0)


def after_tower_note(below: int) -> str:
    """Return a user note that inputs with fewer units than `below` are pruned only after the tower, or "" if `below` is 0."""
    if not below:
        return ""
    return (
        f"inputs of fewer than {below:,} visual tokens were pruned only after the tower, because of inner=auto on a GPU"
    )


class SharedRows:
    """A cache of tower rows for one video and one model, shared by all methods that act after the encoder.

    The attribute `saved` is the time in seconds saved by the cache in the latest call, or 0 on a cache miss.
    """

    def __init__(self):
        self.saved = 0.0
        self._held: OrderedDict[tuple, tuple[TowerOutput, float]] = OrderedDict()

    def encode_rows(self, visual, patches: Iterable[torch.Tensor], plan: EncoderPlan, **options) -> TowerOutput:
        """Return the rows from the cache, or encode them with `vision.encoder.encode_rows`."""
        key = (_tower_work(plan), *sorted((name, value) for name, value in options.items() if name != "on_layer"))
        if key in self._held:
            for _ in patches:  # the patches must be consumed anyway, because their reader counts damaged frames
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


def gray_frames(plan: Plan, _: Iterator[FrameChunk]) -> Iterator[FrameChunk]:
    """Yield gray frames with the size and times of a video's frames, for answering without seeing the video."""
    source = plan.source
    times_s = plan.sampling.times_s
    at_once = source.frames_at_once(plan.chunk_bytes)
    for first in range(0, len(times_s), at_once):
        times = tuple(times_s[first : first + at_once])
        yield FrameChunk(first, np.full((len(times), source.height, source.width, 3), 128, np.uint8), times)


def _tower_work(plan: EncoderPlan) -> tuple:
    """Return a cache key for tower rows.

    If the plan may select or merge rows inside the tower, the key is the entire plan. Otherwise, it contains only the plan fields
    that affect the rows.
    """
    inside = plan.stages
    needs = frozenset()
    if plan.token_stage:
        inside = plan.stages[:-1]
        needs = plan.token_stage.selector.needs
    if any(not isinstance(stage.reduce, SetAside) for stage in inside):
        return (plan,)
    return plan.grid, plan.reuse, plan.predict, inside, needs, plan.prunes
