"""The order in which operations can be left out, found by what each does to the output distribution.

As in the authors' code (zxcvfd13502/GSOP): first the deepest layers lose what costs nothing, by binary search: all kinds of
operation together, then queries and MLP, then queries, for all visual tokens and then for the rest. Then one operation after the
other goes, always the one whose removal costs least by the latest measurement. A loss may grow by a step; where an operation would
exceed that, all that are left are measured again, and the loss may grow by one step more.
Adapted: their loss is the accuracy on a labelled set, and ends at 30% of it in 15 steps. Here it is the KL divergence from the
unpruned model, a step is the same fiftieth of what removing everything costs, and it goes on to the end, so that every budget has
a place in the order. Nothing is lost where all first choices are the unpruned model's. Operations are removed behind the layer that
shows which tokens are key.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from evoprune.pruning.operations import ALL, REST, Operation, closed

STEP = 0.3 / 15  # of the loss with everything removed
# Kinds in the order in which the authors' code tries them; of equal losses the last one goes first.
ORDER = ("queries", "mlp", "keys")

Removed = frozenset[Operation]


@dataclass(frozen=True)
class Loss:
    """What a removal costs. `kl`: mean KL in nats a token. `agree`: share of tokens with the same first choice."""

    kl: float
    agree: float


Measure = Callable[[Removed], Loss]


@dataclass
class Found:
    """The order so far: `steps`, and the `losses` after each of them, None where that was not measured."""

    steps: list[tuple[Operation, ...]]
    losses: list[Loss | None]

    def add(self, step: Collection[Operation], loss: Loss | None) -> None:
        self.steps.append(tuple(sorted(step)))
        self.losses.append(loss)


def candidates(removed: Removed, after: int, depth: int) -> list[Operation]:
    """What may go next. The top layer computes queries and MLP of no visual token."""
    layers = range(after, depth)
    every = [(layer, group, kind) for layer in layers for group in (ALL, REST) for kind in ORDER]
    return [each for each in every if each not in removed and (each[0] < depth - 1 or each[2] == "keys")]


def suffix(first: int, depth: int, group: str, kinds: Collection[str]) -> Removed:
    """Operations of some kinds in all layers from `first` on."""
    return frozenset((layer, group, kind) for layer in range(first, depth) for kind in kinds)


def for_nothing(after: int, depth: int, lossless: Callable[[Removed], bool]) -> Removed:
    """What the deepest layers can lose without a loss."""
    removed: Removed = frozenset()
    for group in (ALL, REST):
        last = depth - 1
        for count in (3, 2, 1):
            kinds = ORDER[:count]

            def passes(first: int, kinds=kinds, group=group, removed=removed) -> bool:
                return lossless(removed | suffix(first, depth, group, kinds))

            first = deepest(after, last, passes)
            if first is not None:
                last, removed = first, removed | suffix(first, depth, group, kinds)
            if last <= after:
                break
    return removed


def deepest(low: int, high: int, passes: Callable[[int], bool]) -> int | None:
    """The lowest of the layers from `low` to `high` that passes, by binary search; None if `high` does not."""
    if low > high or not passes(high):
        return None
    if passes(low):
        return low
    found = high
    while low <= high:
        middle = (low + high) // 2
        if passes(middle):
            found, high = middle, middle - 1
        else:
            low = middle + 1
    return found


def search(after: int, depth: int, measure: Measure, found: Found, go_on: Callable[[], bool] = lambda: True) -> bool:
    """Finds the order; `found` grows step after step.

    Args:
        after, depth: as of a `Recipe`.
        measure: the loss with some operations removed.
        go_on: whether there is time to measure more. Once there is not, the others follow by the latest measurement.

    Returns:
        Whether the order is complete: not where the time was over before everything had been measured once.
    """
    known: dict[Removed, Loss] = {}

    def loss(removed: Removed) -> Loss:
        if removed not in known:
            known[removed] = measure(removed)
        return known[removed]

    removed = for_nothing(after, depth, lambda removed: loss(removed).agree == 1)
    found.add(removed, loss(removed))
    step = STEP * loss(suffix(after, depth, ALL, ORDER)).kl
    allowed, scores = step, {}
    while left := candidates(removed, after, depth):
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
            found.add(then - removed, measured)
            removed = then
    return True
