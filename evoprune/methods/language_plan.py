"""A language method's plan for a prompt, which the decoder runs, and cost, memory check and estimates read. No tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from evoprune.methods.budget import keep_count

KINDS = ("keys", "queries", "mlp")  # of a layer's operations on a token: keys and values; queries and output; the MLP
ALL, REST = "all", "rest"  # visual tokens: all, and those that are not key
Operation = tuple[int, str, str]  # layer, ALL or REST, kind


@dataclass(frozen=True)
class Drop:
    """A place at which visual tokens leave the language model."""

    after: int  # layers that have run by then, at least 1
    left: int  # visual tokens that the other layers read


@dataclass(frozen=True)
class Groups:
    """Two groups of visual tokens for which layers do not compute the same."""

    # Tokens of the key group. The method names them at its first look; all layers up to then compute everything.
    key: int
    gone: frozenset[Operation]  # operations that are left out; where those of all are, those of the rest are among them

    def computed(self, layer: int, kind: str) -> tuple[bool, bool]:
        """Whether a layer computes an operation for the key group, and for the rest."""
        return (layer, ALL, kind) not in self.gone, (layer, REST, kind) not in self.gone


@dataclass(frozen=True)
class LanguagePlan:
    """The visual tokens that each layer of the language model reads."""

    depth: int  # layers of the language model
    tokens: int  # visual tokens that reach it
    drops: tuple[Drop, ...]  # where some of them leave, in order; fewer are left after each. Empty where none leave.
    exact: bool = True  # whether the counts are exact. Otherwise they are upper bounds, and the content decides.
    looks: tuple[int, ...] = ()  # numbers of layers after which the method is asked; those of `drops` if it is `exact`
    blind: int = 0  # the first layers in which text after the visual tokens does not attend to them
    # What layers do not compute for tokens that are still there; None where they compute everything
    groups: Groups | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Visual tokens that each layer reads."""
        return tokens_of_layers(self.depth, self.tokens, [(drop.after, drop.left) for drop in self.drops])

    @property
    def work(self) -> tuple[tuple[int, int, int], ...]:
        """Visual tokens of which each layer computes keys and values, queries and output, and the MLP."""
        if self.groups is None:
            return tuple((count,) * 3 for count in self.layers)
        key, groups = self.groups.key, self.groups
        counts = {(True, True): self.tokens, (True, False): key, (False, True): self.tokens - key, (False, False): 0}
        return tuple(tuple(counts[groups.computed(layer, kind)] for kind in KINDS) for layer in range(self.depth))

    def left(self, after: int) -> int:
        """Visual tokens that the plan leaves once `after` layers have run."""
        return self.layers[min(after, self.depth - 1)]


def tokens_of_layers(depth: int, tokens: int, drops: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Visual tokens that each of `depth` layers reads, of `tokens` at first and pairs of (layers that have run, tokens left)."""
    edges = [(0, tokens), *drops, (depth, 0)]
    return tuple(left for (after, left), (end, _) in pairwise(edges) for _ in range(after, end))


def layers_before(share: float, depth: int) -> int:
    """After how many of `depth` layers, from 1 to depth - 1, a `share` of them has run. 0 where there is only one layer."""
    return min(depth - 1, max(1, round(share * depth)))


def one_drop(depth: int, tokens: int, place: float, budget: float) -> LanguagePlan:
    """Once a share `place` of the layers has run, the share `budget` of the tokens is left: `keep_count` of them."""
    return _plan(depth, tokens, [layers_before(place, depth)], [keep_count(budget, tokens)])


def several_drops(
    depth: int, tokens: int, places: Sequence[float], shares: Callable[[float], Sequence[float]], budget: float
) -> LanguagePlan:
    """Several drops, so that `budget` is the mean share of tokens over the layers after the first of them.

    `places`: the share of layers that has run at each. `shares`: from a number to the share left after each, growing from 0 to 1.
    """
    layers = [layers_before(place, depth) for place in places]
    runs = [end - start for start, end in zip(layers, [*layers[1:], depth], strict=True)]  # layers after each drop
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(run * share for run, share in zip(runs, shares(middle), strict=True)) / max(1, sum(runs))
        low, high = (middle, high) if mean < budget else (low, middle)
    # Rounded before it is rounded down: a share that is a little below a half by the search alone is that half.
    counts = [max(1, math.floor(round(share * tokens, 6) + 0.5)) for share in shares(high)]
    return _plan(depth, tokens, layers, counts)


def _plan(depth: int, tokens: int, layers: Sequence[int], counts: Sequence[int]) -> LanguagePlan:
    """The plan without drops at which nothing would leave; of several after the same layer, the last."""
    drops: list[Drop] = []
    for after, left in zip(layers, counts, strict=True):
        if drops and drops[-1].after == after:
            drops.pop()
        if after and left < (drops[-1].left if drops else tokens):
            drops.append(Drop(after, left))
    return LanguagePlan(depth, tokens, tuple(drops), looks=tuple(drop.after for drop in drops))
