"""How many rows are left after every layer, computed before the tower runs. Plain integers, no tensors.

The six allocations of EvoPrune (arXiv 2603.03681) divide the reduction among the layers of a range: evenly (`mean`),
among every second layer (`skip`, the paper's best), among the first or the second half (`first`, `last`), or with
weights that rise or fall (`increasing`, `decreasing`). Ranges are in relative depth, so that towers of 8 and of 32
layers share settings.
"""

import math

from evoprune.pruning.encoder_plan import TowerShape

ALLOCATIONS = ("mean", "skip", "first", "last", "increasing", "decreasing")


def layer_weights(depth: int, allocation: str, first: float, last: float) -> dict[int, float]:
    """The layers that reduce, each with its share of the whole reduction; the shares sum to one.

    Args:
        depth: number of layers.
        allocation: one of ALLOCATIONS.
        first, last: the range in relative depth; layer l ends at (l + 1) / depth. The range always has at least one layer.

    Raises:
        ValueError: an unknown allocation or an empty range.
    """
    if allocation not in ALLOCATIONS or not 0 <= first <= last <= 1:
        raise ValueError(
            f"no schedule {allocation!r} from {first} to {last}: one of {ALLOCATIONS}, 0 <= first <= last <= 1"
        )
    end = min(depth, max(1, round(last * depth))) - 1
    begin = min(end, max(0, math.ceil(first * depth) - 1))
    layers = list(range(begin, end + 1))
    n = len(layers)
    weights = {
        "mean": lambda i: 1,
        "skip": lambda i: (n - 1 - i) % 2 == 0,  # counted from the end, so that the last layer of the range reduces
        "first": lambda i: i < (n + 1) // 2,
        "last": lambda i: i >= n // 2,
        "increasing": lambda i: i + 1,
        "decreasing": lambda i: n - i,
    }[allocation]
    total = sum(weights(i) for i in range(n))
    return {layer: weights(i) / total for i, layer in enumerate(layers) if weights(i)}


def rows_after_layers(tower: TowerShape, units: int, windows: int, keep: int, weights: dict[int, float]) -> list[int]:
    """Rows of one frame pair after each layer, from `units` down to `keep`.

    A layer that merges inside windows leaves at least one row in each window. The next full-attention layer removes the
    excess, even if it is outside the range.

    Args:
        tower: the shape of the vision tower.
        units, windows: of the frame pair.
        keep: rows after the last layer, at least 1.
        weights: from `layer_weights`.

    Returns:
        `depth` counts that never rise. The last exceeds `keep` only in a tower without a full layer at or after the range.
    """
    rows, done, counts = units, 0.0, []
    for layer in range(tower.depth):
        done += weights.get(layer, 0.0)
        wish = units - math.floor((units - keep) * min(done, 1.0) + 0.5)
        if tower.scope(layer) == "window":
            # Outside the range a window layer does not reduce; only full-attention layers do.
            wish = max(wish, windows) if layer in weights else rows
        rows = min(rows, wish)
        counts.append(rows)
    return counts
