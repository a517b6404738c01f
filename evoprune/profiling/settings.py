"""What a benchmark sweeps, and how often it measures."""

from dataclasses import dataclass

from evoprune import methods

SYNTHETIC = ("motion", "static90", "noise")  # kinds of synthetic clips, see `synthetic`


@dataclass(frozen=True)
class Settings:
    """What is swept, and how often it is measured."""

    # budgets, methods, quantize: every method runs at every budget, with each quantisation of the language model's
    # weights
    budgets: tuple[float, ...]
    methods: tuple[str, ...] = (methods.DEFAULT,)
    quantize: tuple[str, ...] = ("none",)
    method_args: dict[str, str] | None = None  # settings of the methods, as texts
    seed: int = 0  # for methods that select at random
    new_tokens: int = 4  # generated in any case; ends of sequence are ignored
    # warmups, repetitions: rounds; warm-ups are not counted
    warmups: int = 1
    repetitions: int = 3
    # Of the whole run. Rows and rounds that would end later are left out; one round of the least rows runs in any case,
    # see `time_limit`.
    time_limit_s: float = 150.0

    def parse(self, name: str):
        """The `Pipeline` that a name means, with the settings of all methods."""
        return methods.parse(name, self.method_args)
