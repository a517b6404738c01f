"""Losses of removed operations that anyone can make again: whole numbers, of a seed."""

from collections.abc import Iterable

from evoprune.contrib.operation_search import ORDER
from evoprune.methods.plans import ALL, REST, Operation

WHOLE = 1_000_000  # the accuracy with nothing removed, for code that asks for one


def made_up_loss(seed: int, depth: int, removed: Iterable[Operation]) -> int:
    """Less in deeper layers and for the rest, nothing in the deepest; some pairs of layers cost more together, some less."""
    gone, total = set(removed), 0
    for layer, group, kind in gone:
        if layer < depth - 1 - (seed + ORDER.index(kind)) % (depth // 2):
            total += drawn(seed, layer, group, kind) * (depth - layer) // (3 if group == REST else 1)
    for layer in range(depth - 1):
        for kind in ORDER:
            if (layer, ALL, kind) in gone and (layer + 1, ALL, kind) in gone:
                total += drawn(seed, layer, "pair", kind) - 500
    return max(0, total)


def drawn(seed: int, layer: int, group: str, kind: str) -> int:
    """From 0 to 999, the same everywhere."""
    number = 7919 * seed + 104729 * layer + 1299709 * len(group) + 15485863 * len(kind)
    for _ in range(3):
        number = (number * 6364136223846793005 + 1442695040888963407) % 2**64
    return (number >> 33) % 1000
