"""How many rows are left after every layer, known before the tower runs. Plain integers, no tensors.

The six allocations of EvoPrune (arXiv 2603.03681): the reduction is shared out over the layers of a range evenly (`mean`), over
every other of them (`skip`, the paper's best), over the earlier or the later half (`first`, `last`), or with weights that rise
or fall (`increasing`, `decreasing`). Ranges are in relative depth, so that towers of 8 and of 32 layers share settings.
"""

import math
from collections.abc import Sequence

from evoprune.pruning.plan import TowerShape

ALLOCATIONS = ("mean", "skip", "first", "last", "increasing", "decreasing")


def layer_weights(depth: int, allocation: str, first: float, last: float) -> dict[int, float]:
    """Which layers reduce and by what share of the whole reduction; the shares sum to one.

    Args:
        depth: number of layers.
        allocation: one of ALLOCATIONS.
        first, last: the range in relative depth; layer l ends at (l + 1) / depth. At least one layer is always in it.

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
        "skip": lambda i: (n - 1 - i) % 2 == 0,  # counted from the end, so that the last layer of the range takes part
        "first": lambda i: i < (n + 1) // 2,
        "last": lambda i: i >= n // 2,
        "increasing": lambda i: i + 1,
        "decreasing": lambda i: n - i,
    }[allocation]
    total = sum(weights(i) for i in range(n))
    return {layer: weights(i) / total for i, layer in enumerate(layers) if weights(i)}


def rows_after_layers(tower: TowerShape, units: int, windows: int, keep: int, weights: dict[int, float]) -> list[int]:
    """Rows of one grid after each layer, from `units` down to `keep`.

    A window keeps at least one row in a layer that merges inside windows; what that costs is made up for in the next layer
    that attends to whole grids, beyond the range if need be.

    Args:
        windows: windows a grid.
        keep: rows to end with, at least 1.

    Returns:
        `depth` counts, never rising. The last exceeds `keep` only in a tower without a full layer at or after the range.
    """
    rows, done, counts = units, 0.0, []
    for layer in range(tower.depth):
        done += weights.get(layer, 0.0)
        wish = units - math.floor((units - keep) * min(done, 1.0) + 0.5)
        if tower.scope(layer) == "window":
            # Beyond the range a window layer does not reduce: only whole grids make up for what is missing.
            wish = max(wish, windows) if layer in weights else rows
        rows = min(rows, wish)
        counts.append(rows)
    return counts


def share_by_size(sizes: Sequence[int], total: int) -> list[int]:
    """Largest remainder: how many of `total` each group keeps, in proportion to `sizes`, at least one where there is any.

    Args:
        sizes: rows of each group now; zeros stay zero.
        total: between the number of groups with rows and `sum(sizes)`.

    Returns:
        Counts with `count <= size` that sum to `total`; ties by index.

    Raises:
        ValueError: `total` is out of that range.
    """
    whole = sum(sizes)
    if not sum(map(bool, sizes)) <= total <= whole:
        raise ValueError(f"cannot keep {total} of {whole} rows in {sum(map(bool, sizes))} groups")
    counts = [max(1, total * size // whole) if size else 0 for size in sizes]
    missing = total - sum(counts)
    # Who got least, or most, of what is due to it; in whole numbers, so that ties are ties.
    excess = [count * whole - total * size for count, size in zip(counts, sizes, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: (excess[i], i))
    while missing > 0:
        for i in order:
            if missing and counts[i] < sizes[i]:
                counts[i], missing = counts[i] + 1, missing - 1
    order.sort(key=lambda i: (-excess[i], i))
    while missing < 0:
        for i in order:
            if missing and counts[i] > 1:
                counts[i], missing = counts[i] - 1, missing + 1
    return counts
