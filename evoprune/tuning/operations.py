"""The order in which operations can be left out, found by what each does to the output distribution (docs/methods.md, operations).

First the deepest layers lose what costs nothing, then one operation after the other goes. The top layer computes queries and MLP
of no visual token.
"""

from bisect import bisect_left
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

from evoprune.pruning.language_plan import ALL, REST, Operation
from evoprune.pruning.operations import Removed, closed

STEP = 0.3 / 15  # of the loss with everything removed
# Kinds in the order in which the authors' code tries them; of equal losses the last one goes first.
ORDER = ("queries", "mlp", "keys")


class Loss(NamedTuple):
    """What a removal costs. `kl`: mean KL in nats a token. `agree`: share of tokens with the same first choice."""

    kl: float
    agree: float


class Step(NamedTuple):
    """Operations that go together, and the loss after them; None where that was not measured."""

    operations: tuple[Operation, ...]
    kl: float | None = None
    agree: float | None = None


def for_nothing(after: int, depth: int, lossless: Callable[[Removed], bool]) -> Removed:
    """What the deepest layers can lose without a loss."""
    removed: Removed = frozenset()
    for group in (ALL, REST):
        last = depth - 1
        for kinds in (ORDER, ORDER[:2], ORDER[:1]):
            more = [removed | {*product(range(first, depth), [group], kinds)} for first in range(depth)]
            first = deepest(after, last, lambda first, more=more: lossless(more[first]))
            if first is not None:
                last, removed = first, more[first]
            if last <= after:
                break
    return removed


def deepest(low: int, high: int, passes: Callable[[int], bool]) -> int | None:
    """The lowest of the layers from `low` to `high` that passes, by binary search; None if `high` does not."""
    if low > high or not passes(high):
        return None
    return low + bisect_left(range(low, high), True, key=passes)


def search(
    after: int,
    depth: int,
    measure: Callable[[Removed], Loss],
    found: list[Step],
    go_on: Callable[[], bool] = lambda: True,
) -> bool:
    """Finds the order for a `Recipe`; `found` grows step after step.

    Args:
        measure: the loss with some operations removed.
        go_on: whether there is time to measure more. Once there is not, the others follow by the latest measurement.

    Returns whether the order is complete: not where the time was over before everything had been measured once.
    """
    known: dict[Removed, Loss] = {}

    def loss(removed: Removed) -> Loss:
        if removed not in known:
            known[removed] = measure(removed)
        return known[removed]

    def add(operations: Removed, loss: Loss | None) -> None:
        found.append(Step(tuple(sorted(operations)), *(loss or ())))

    every = [*product(range(after, depth), (ALL, REST), ORDER)]
    removed = for_nothing(after, depth, lambda removed: loss(removed).agree == 1)
    add(removed, loss(removed))
    step = STEP * loss(frozenset(product(range(after, depth), [ALL], ORDER))).kl
    allowed, scores = step, {}
    while left := [each for each in every if each not in removed and (each[0] < depth - 1 or each[2] == "keys")]:
        for each in left:
            if each not in scores:
                if not go_on():
                    return False
                scores[each] = loss(closed(removed | {each}, depth)).kl
        best = min(reversed(left), key=scores.__getitem__)
        then = closed(removed | {best}, depth)
        measured = loss(then) if go_on() else None
        if measured and step and measured.kl > allowed:
            allowed += step
            scores |= {each: loss(closed(removed | {each}, depth)).kl for each in left if go_on()}
        else:
            add(then - removed, measured)
            removed = then
    return True
