"""The settings that are tried."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from evoprune import methods

BUDGETS = (0.5, 0.35, 0.25, 0.15, 0.1)
# This project's method as it is, with as few rows as tokens, with its first selection after half of the tower's layers, and with
# tokens spread evenly over time; and the paper's merging.
METHODS = ("evoprune", "evoprune:rows=1", "evoprune:depth=0.5", "evoprune:floor=1", "evoprune-paper")


@dataclass(frozen=True)
class Candidate:
    """A method, with its settings in its name, at a budget."""

    method: str
    budget: float

    @property
    def name(self) -> str:
        """As on a command line."""
        return f"{self.method} -b {self.budget:g}"


def candidates(budgets: Sequence[float] = (), more: Sequence[str] = ()) -> list[Candidate]:
    """Every method at every budget, without those that prune nothing.

    Args:
        budgets: instead of `BUDGETS`.
        more: methods beside `METHODS`.

    Raises:
        UsageError: an unknown method, or settings that it does not have.
    """
    named = {name: methods.parse(name) for name in dict.fromkeys((*METHODS, *more)) if name != "none"}
    pairs = product(named, sorted(set(budgets or BUDGETS), reverse=True))
    return [Candidate(name, budget) for name, budget in pairs if named[name].acts_at(budget)]
