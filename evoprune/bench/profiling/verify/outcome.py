"""What a check is and what comes of it: held, differs or skipped; and the distance between what two programs computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

import torch

HELD, DIFFERS, SKIPPED = "held", "differs", "skipped"
# How far two roundings of the same number may be from each other, as a multiple of the distance of one from the exact number. The
# largest of many distances varies more than their mean.
MEAN, LARGEST = 2.0, 3.0


@dataclass(frozen=True)
class Outcome:
    """What comes of a check.

    Attributes:
        state: `HELD`, `DIFFERS` or `SKIPPED`.
        says: by what it differs, why it was skipped, or the figures, in one line.
        figures: numbers by name; for each that was judged also its limit, NAME_limit.
    """

    state: str
    says: str
    figures: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        compares: what is compared with what, for people.
        run: compares; called with a `Subject`.
        slow: whether `--quick` leaves it out.
    """

    name: str
    compares: str
    run: Callable[[Any], Outcome]
    slow: bool = False


def skipped(why: str) -> Outcome:
    return Outcome(SKIPPED, why)


def judged(says: str, limits: dict[str, tuple[float, float]]) -> Outcome:
    """Held where each figure is at most its limit; otherwise says the first that is not.

    Args:
        says: where all hold.
        limits: of each figure by name, the figure and its limit.
    """
    figures: dict[str, float | None] = {}
    for name, (value, limit) in limits.items():
        figures |= {name: value if isfinite(value) else None, f"{name}_limit": limit}
    for name, (value, limit) in limits.items():
        if not value <= limit:  # also where it is no number
            return Outcome(DIFFERS, f"{name.replace('_', ' ')} {value:.2g}, expected at most {limit:.2g}", figures)
    return Outcome(HELD, says, figures)


class Gap(NamedTuple):
    """Relative distances between rows: their mean, and the largest."""

    mean: float
    largest: float

    def limits(self, noise: "Gap", times: float = 1.0) -> dict[str, tuple[float, float]]:
        """The two figures with the limits that `noise`, the distance of one rounding, sets."""
        return {
            "mean_error": (self.mean, times * MEAN * noise.mean),
            "largest_error": (self.largest, times * LARGEST * noise.largest),
        }

    def worse(self, other: Sequence[float]) -> "Gap":
        return Gap(*map(max, self, other))

    def __str__(self) -> str:
        return f"error {self.mean:.1e}, at most {self.largest:.1e}"


def gap(made: torch.Tensor, expected: torch.Tensor, centred: bool = False) -> Gap:
    """How far the rows of `made` `[n, D]` are from those of `expected`, in lengths of these.

    `centred`: rows are compared without their means, as logits are, of which only differences matter.
    """
    made, expected = (x.detach().cpu().double() for x in (made, expected))
    if made.shape != expected.shape:
        return Gap(float("inf"), float("inf"))
    if centred:
        made, expected = (x - x.mean(1, keepdim=True) for x in (made, expected))
    tiny = torch.finfo(torch.float32).tiny
    each = (made - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=tiny)
    return Gap(float(each.mean()), float(each.max()))
