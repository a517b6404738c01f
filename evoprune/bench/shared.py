"""What `profile`, `eval`, `tune` and `verify` share: time limits and rounds, the settings of a sweep, and the tower's rows."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from evoprune.backend import environment
from evoprune.methods import EncoderPlan, PruneConfig, SetAside
from evoprune.model import Clock
from evoprune.session import LoadedModel, OpenInput, PruneOptions, chunk_bytes
from evoprune.video import FrameChunk, OnFrames, frames_at_once
from evoprune.vision import EncodedRows, encode_rows

T = TypeVar("T")
# Encodings held: enough for the selectors behind `reuse`, which need attention, keys, both or nothing, at three budgets, whatever
# other methods run between them.
MAX_ENCODINGS = 32


@dataclass
class TimeLimit:
    """A limit on the seconds of a run that `begun` at some time of the clock `now`, by default at once."""

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
        """Seconds that are left; negative after the end."""
        return self.seconds - self.spent


def model_and_machine(loaded: LoadedModel | None) -> dict[str, Any]:
    """Return the facts of a document about the model and the machine; None for both before a model is loaded."""
    if loaded is None:
        return {"model": None, "env": None}
    return {"model": asdict(loaded.facts()), "env": asdict(environment(loaded.device))}


# What `paced` yields beside a round.
WARM_UP = "warm-up"
ROUND = "round"
COUNTED = "counted"


def paced(
    run_round: Callable[[str, int], T], warmups: int, repetitions: int, limit: TimeLimit
) -> Iterator[tuple[str, T]]:
    """Run rounds while they end in time, judged by the round before; the first one in any case.

    Args:
        run_round: gets a title; and how many rounds must end in time if it is the first one, which may then do less, otherwise 0.

    Yields `WARM_UP` or `ROUND` and the round; and the last warm-up once more with `COUNTED` if no measured round ends in time.
    """
    last = 0.0
    result = None
    measured = False
    titles = [(WARM_UP, n, warmups) for n in range(warmups)] + [(ROUND, n, repetitions) for n in range(repetitions)]
    for phase, number, wanted in titles:
        rounds = 1 if phase == ROUND else 2  # a measured round comes after each warm-up
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
    """Return each method at each budget, once, if it prunes anything there. Raises UsageError: as `PruneOptions.config`."""
    pairs = dict.fromkeys(product(names, budgets))
    return [(name, budget) for name, budget in pairs if name != "none" and PruneOptions(budget, name).config().prunes]


def after_tower_below(configs: Iterable[PruneConfig], device: str) -> int:
    """Return the number of units below which one of the methods prunes inputs after the tower alone on a device; 0: none does."""
    return max((config.after_tower_below(torch.device(device)) for config in configs), default=0)


def after_tower_note(below: int) -> str:
    """Say which inputs are pruned after the tower alone; empty where none is. `below`: of `after_tower_below`."""
    if not below:
        return ""
    return (
        f"inputs of fewer than {below:,} visual tokens were pruned after the tower alone, as inner=auto has it on a GPU"
    )


class SharedRows:
    """Share the tower's rows of one video in one model. Methods that act after the encoder differ only in what they select.

    `saved` is the seconds that the latest call would have taken more if its rows had not been there.
    """

    def __init__(self):
        self.saved = 0.0
        self._held: OrderedDict[tuple, tuple[EncodedRows, float]] = OrderedDict()

    def encode_rows(self, visual, patches: Iterable[torch.Tensor], plan: EncoderPlan, **options) -> EncodedRows:
        """Encode rows as `vision.encoder.encode_rows`."""
        key = (_tower_work(plan), *sorted((name, value) for name, value in options.items() if name != "on_layer"))
        if key in self._held:
            for _ in patches:  # the reader of the patches counts damaged frames
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
    """Encode an input with shared rows."""

    shared_rows: SharedRows

    def run_tower(self, patches: Iterator[torch.Tensor], **options) -> EncodedRows:
        visual = self.session.loaded.model.model.visual
        return self.shared_rows.encode_rows(visual, patches, self.plan.encoder, **options)


class GreyInput(OpenInput):
    """Every frame is grey: the size and the length of a video without its content."""

    shares: ClassVar[bool] = False

    def frames(self, on_frames: OnFrames) -> Iterator[FrameChunk]:
        source = self.plan.source
        times_s = self.plan.sampling.times_s
        at_once = frames_at_once(source, chunk_bytes(self.plan))
        for first in range(0, len(times_s), at_once):
            times = tuple(times_s[first : first + at_once])
            yield FrameChunk(first, np.full((len(times), source.height, source.width, 3), 128, np.uint8), times)


def _tower_work(plan: EncoderPlan) -> tuple:
    """Return all that the tower's rows depend on: the plan if tokens may be selected inside, else what is collected."""
    inside = plan.stages
    needs = frozenset()
    if plan.token_stage:
        inside = plan.stages[:-1]
        needs = plan.token_stage.selector.needs
    if any(not isinstance(stage.reduce, SetAside) for stage in inside):
        return (plan,)
    return plan.grid, plan.reuse, inside, needs, plan.prunes
