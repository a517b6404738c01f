"""Which operations of the language model can be left out for visual tokens, in which order: a recipe. Plain integers, no tensors.

An operation is (layer, group, kind). The groups are all visual tokens, and the rest: those that are not among the most important.
Leaving out one of all leaves out that of the rest. A token without an operation keeps its state of before.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import sha256

from evoprune.pruning.budget import keep_count
from evoprune.pruning.language_plan import KINDS, Drop, Groups, LanguagePlan

ALL, REST = "all", "rest"
Operation = tuple[int, str, str]  # layer, group, kind
Done = list[tuple[frozenset[str], frozenset[str]]]  # of each layer: kinds computed for the key tokens, and for the rest


@dataclass(frozen=True)
class Recipe:
    """Operations in the order in which they are left out, for a language model of one depth.

    Attributes:
        depth: layers of the language model.
        after: layers that compute everything. Behind them the tokens are put into groups.
        key: share of the visual tokens that are not among the rest.
        weights: share of a layer's work on a token that each of `KINDS` is.
        steps: what is left out at each step; together all that can be.

    Raises:
        ValueError: a value that cannot be.
    """

    depth: int
    after: int
    key: float
    weights: tuple[float, ...]
    steps: tuple[tuple[Operation, ...], ...]

    def __post_init__(self):
        if not (1 <= self.after <= self.depth and 0 < self.key < 1):
            raise ValueError("after must be from 1 to depth, and key a share")
        if len(self.weights) != len(KINDS) or min(self.weights) <= 0:
            raise ValueError(f"weights must be {len(KINDS)} numbers above 0")
        for layer, group, kind in (operation for step in self.steps for operation in step):
            if not self.after <= layer < self.depth or group not in (ALL, REST) or kind not in KINDS:
                raise ValueError(f"there is no operation {[layer, group, kind]}")

    @property
    def digest(self) -> str:
        """Twelve digits that name this recipe in reports."""
        return sha256(repr(self).encode()).hexdigest()[:12]

    def count(self, budget: float) -> int:
        """The fewest steps that leave at most `budget` (in (0, 1]) of the work; all if none do."""
        fits = (count for count in range(len(self.steps)) if self.share(self._first(count)) <= budget)
        return next(fits, len(self.steps))

    def removed(self, budget: float) -> frozenset[Operation]:
        """The operations of those steps."""
        return self._first(self.count(budget))

    def _first(self, count: int) -> frozenset[Operation]:
        return frozenset().union(*self.steps[:count])

    def share(self, removed: Iterable[Operation]) -> float:
        """The share of the work on visual tokens that is left in the layers behind `after`; attention is not counted."""
        weight, sizes = dict(zip(KINDS, self.weights, strict=True)), (self.key, 1 - self.key)

        def work(done: Done) -> float:
            layers = (zip(sizes, layer, strict=True) for layer in done[self.after :])
            return sum(weight[kind] * size for layer in layers for size, of in layer for kind in sorted(of))

        # Rounded, so that what leaves a quarter by the sum of many shares fits into a budget of a quarter.
        return round(work(self._done(removed)) / work(self._done(())), 9) if self.after < self.depth else 1.0

    def plan(self, tokens: int, removed: Iterable[Operation]) -> LanguagePlan:
        """The plan for so many visual tokens. A group that no later layer reads leaves for good."""
        done, key = self._done(removed), keep_count(self.key, tokens)
        if all(kinds == (frozenset(KINDS),) * 2 for kinds in done):
            return LanguagePlan(self.depth, tokens, ())
        ends = [max(layer for layer in range(self.depth) if "keys" in done[layer][group]) + 1 for group in (0, 1)]
        drops = [Drop(ends[1], key)] if ends[1] < ends[0] and key < tokens else []
        drops += [Drop(ends[0], 0)] if ends[0] < self.depth else []
        looks = sorted({self.after, *(drop.after for drop in drops)})
        return LanguagePlan(self.depth, tokens, tuple(drops), looks=tuple(looks), groups=Groups(key, tuple(done)))

    def _done(self, removed: Iterable[Operation]) -> Done:
        """What is computed. In the last layer that computes a group's keys, nothing but these is of use.

        The top layer computes queries and MLP of the last position alone. They count as computed, as they do with other methods.
        """
        gone, made = closed(removed, self.depth), []
        ends = {group: _end(gone, group, self.depth) for group in (ALL, REST)}
        for layer in range(self.depth):
            last = {group for group, end in ends.items() if self.after <= layer == end}
            of_last = frozenset(KINDS if layer == self.depth - 1 else ("keys",))
            made.append(
                tuple(
                    of_last if group in last else frozenset(k for k in KINDS if (layer, group, k) not in gone)
                    for group in (ALL, REST)
                )
            )
        return made


def closed(removed: Iterable[Operation], depth: int) -> frozenset[Operation]:
    """`removed`, with those of the rest where those of all are, and with what nothing reads behind a group's last keys."""
    made = set(removed)
    made |= {(layer, REST, kind) for layer, group, kind in made if group == ALL}
    for group in (ALL, REST):
        made |= {(layer, group, kind) for layer in range(_end(made, group, depth) + 1, depth) for kind in KINDS}
    return frozenset(made)


def _end(removed: Collection[Operation], group: str, depth: int) -> int:
    """The last layer that computes a group's keys; `depth` if none does."""
    return max((layer for layer in range(depth) if (layer, group, "keys") not in removed), default=depth)
