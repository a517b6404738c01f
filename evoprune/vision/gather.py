"""What methods may ask for after the encoder, taken from the last of the tower's layers that sees whole grids."""

import torch

from evoprune.methods.base import Method
from evoprune.pruning.schedule import TowerShape
from evoprune.pruning.score import unit_features
from evoprune.vision.attention import Bucket, Packed, attention_received
from evoprune.vision.layout import TokenLayout

KNOWN = ("attention", "keys")


class Gathering:
    """Collects what a method asked for, chunk after chunk.

    Args:
        method: asks; it may not ask for more than there is.
        tower: whose last full-attention layer, `layer`, is looked at.

    Raises:
        TypeError: something unknown was asked for. ValueError: the tower has no layer that sees whole grids.
    """

    def __init__(self, method: Method, tower: TowerShape):
        if unknown := sorted(method.needs_after - set(KNOWN)):
            raise TypeError(
                f"method {method.name} needs {unknown[0]!r}; after the encoder there is {' and '.join(KNOWN)}"
            )
        if not tower.full_layers:
            raise ValueError(f"method {method.name} needs a layer that sees whole grids, and this tower has none")
        self.layer = max(tower.full_layers)
        self._collected: dict[str, list[torch.Tensor]] = {name: [] for name in sorted(method.needs_after)}
        self._seen: tuple[TokenLayout, dict[str, torch.Tensor]] | None = None

    def look(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        plain: torch.Tensor,
        layout: TokenLayout,
        groups: list[Bucket] | Packed,
        bias: bool,
    ) -> None:
        """Takes what there is of one chunk in that layer.

        Args:
            q: `[R, 4, heads, d]` and k: `[R or more, 4, heads, d]` after rotary, plain: keys before it.
            layout, groups: of its rows, in grids. bias: whether attention counts a merged row as often as its units.
        """
        values = {}
        if "attention" in self._collected:
            values["attention"] = rows_attention(q, k, layout, groups, bias)
        if "keys" in self._collected:
            values["keys"] = unit_features(plain)
        self._seen = layout, values

    def settle(self, layout: TokenLayout, order: torch.Tensor) -> None:
        """Ends a chunk: rows that have merged since then have the mean over their units. `order`: int64 `[R]`, of the rows left."""
        if self._seen is None:  # nothing new in the chunk
            return
        (before, values), self._seen = self._seen, None
        into, size = layout.owner[before.home], before.size.float()
        share = size / torch.zeros(layout.rows).index_add_(0, into, size)[into]
        for name, value in values.items():
            mean = value.new_zeros(layout.rows, *value.shape[1:])
            mean.index_add_(0, into, torch.einsum("r...,r->r...", value, share))
            self._collected[name].append(mean[order])

    def collected(self) -> dict[str, torch.Tensor]:
        """Everything, by name, `[E, ...]`, rows ordered by place."""
        return {name: torch.cat(parts) for name, parts in self._collected.items()}


def rows_attention(
    q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, groups: list[Bucket] | Packed, bias: bool
) -> torch.Tensor:
    """float32 `[R]`, as `Tokens.attention` has it, for any one of the units that a row stands for. Arguments as in `look`."""
    asking, seen = units_asking_and_seen(layout)
    return attention_received(q, k, groups, bias, asking) / seen * layout.geometry.units


def units_asking_and_seen(layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """How many units of its grid each row asks for, and as how many units of its block it is seen by grids that ask; int64 `[R]`.

    A grid in which nothing is new has no rows and asks nothing.
    """
    rows = layout.rows
    unit = torch.arange(len(layout.owner))
    own = (layout.owner >= 0) & (layout.owner < rows)
    row = layout.owner.clamp(0, rows - 1)
    grid, home = (layout.group_of(x, "grid") for x in (unit, layout.home[row]))
    asks = torch.zeros(layout.grids, dtype=torch.bool).index_fill_(0, layout.group_of(layout.home, "grid"), True)
    near = layout.group_of(unit, "block") == layout.group_of(layout.home[row], "block")
    none = torch.zeros(rows, dtype=torch.int64)
    asking = none.scatter_add(0, row, (own & (grid == home)).long())
    return asking, none.scatter_add(0, row, (own & near & asks[grid]).long())
