"""How an answer is generated. Imports no torch."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from evoprune.errors import UsageError
from evoprune.util import check_types, option

Think = Literal["off", "on"]
THINK = get_args(Think)


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated. Raises UsageError: a value out of range."""

    PANEL: ClassVar[str] = "Generation"

    max_new_tokens: int = option(256, "Longest answer, in tokens.", "-n", "--max-new-tokens")
    temperature: float = option(
        0.0,
        "0 is greedy.",
        "-t",
        "--temperature",
    )
    top_p: float = option(
        1.0,
        "Nucleus sampling.",
    )
    top_k: int = option(
        0,
        "Draw among the N most probable tokens; 0: all.",
    )
    repetition_penalty: float | None = option(
        None,
        "Above 1, tokens of prompt and answer are less probable; 1: off; default: that of the model's generation_config.json.",
        metavar="N",
    )
    system: str | None = option(None, "A system prompt.", "-s", "--system", metavar="TEXT")
    think: Think = option(
        "off",
        "Whether a model that can do both thinks before it answers. -n counts thoughts and answer together.",
    )

    def __post_init__(self):
        check_types(self)
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}", "ask for at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}", "0 is greedy, 1 samples as the model was trained")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}", "top_p is a probability above 0, and 1 keeps every token")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}", "0 keeps every token")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}", "1 is off, 1.05 is a usual value")
        if self.think not in THINK:
            raise UsageError(f"think is {self.think!r}", f"use {' or '.join(THINK)}")

    @property
    def thinking(self) -> bool:
        return self.think == "on"

    def record(self, seed: int) -> dict[str, Any]:
        """As reports hold it: how tokens are chosen, with the seed of the draws."""
        return {name: value for name, value in asdict(self).items() if name != "system"} | {"seed": seed}
