"""What a benchmark sweeps, how often it measures, and how long it may take."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from evoprune import methods

SYNTHETIC = ("motion", "static90", "noise")  # kinds of synthetic clips, see `synthetic`


@dataclass(frozen=True)
class Settings:
    """Every method runs at every budget, with each quantisation of the language model's weights."""

    budgets: tuple[float, ...]
    methods: tuple[str, ...] = (methods.DEFAULT,)
    quantize: tuple[str, ...] = ("none",)
    method_args: dict[str, str] | None = None  # settings of the methods, as texts
    seed: int = 0  # for methods that select at random
    new_tokens: int = 4  # generated in any case; ends of sequence are ignored
    warmups: int = 1  # rounds that are not counted
    repetitions: int = 3  # rounds that are
    time_limit_s: float = 150.0  # of the whole run, loading included

    def parse(self, name: str):
        """The `Pipeline` that a name means, with the settings of all methods."""
        return methods.parse(name, self.method_args)


@dataclass
class TimeLimit:
    """The seconds that a run may take since it `begun`, by the clock `now`."""

    seconds: float
    now: Callable[[], float] = time.perf_counter
    begun: float | None = None

    def __post_init__(self):
        self.begun = self.now() if self.begun is None else self.begun

    @property
    def spent(self) -> float:
        return self.now() - self.begun

    @property
    def left(self) -> float:
        """Negative when the limit is over."""
        return self.seconds - self.spent
