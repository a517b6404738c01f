"""How many rows are left after every layer, computed before the tower runs. Plain integers, no tensors.

The six allocations are those of EvoPrune (arXiv 2603.03681). Ranges are in relative depth, for towers of any depth.
"""

import math

from evoprune.pruning.encoder_plan import TowerShape

ALLOCATIONS = ("mean", "skip", "first", "last", "increasing", "decreasing")


def layer_weights(depth: int, allocation: str, first: float, last: float) -> dict[int, float]:
    """The layers that reduce, each with its share of the whole reduction; the shares sum to one.

    `first` and `last`: the range in relative depth, of at least one layer; layer l ends at (l + 1) / depth.

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

    A layer that merges inside windows leaves at least one row in each of the `windows`. The next full-attention layer removes the
    excess, even if it is outside the range; in a tower without one, more than `keep` (at least 1) are left. `weights`: from
    `layer_weights`.
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
