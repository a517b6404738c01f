"""How an answer is decoded. Imports no torch."""

from dataclasses import dataclass

from evoprune.errors import UsageError


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: at most so many tokens, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it and a token is drawn.
        top_p: draw only among the most probable tokens that together reach this probability, in (0, 1].
        seed: of the draw; the same seed gives the same answer.

    Raises:
        UsageError: a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}", "ask for at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}", "0 is greedy, 1 samples as the model was trained")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}", "top_p is a probability above 0, and 1 keeps every token")
