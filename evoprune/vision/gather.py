"""What selectors may ask for after the encoder, taken from the tower's last full-attention layer."""

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.plan import TowerShape
from evoprune.pruning.score import unit_features
from evoprune.vision.buckets import Bucket, Packed
from evoprune.vision.layout import TokenLayout
from evoprune.vision.received import attention_received

KNOWN = ("attention", "keys")


class Gathering:
    """Collects what a selector needs, chunk after chunk.

    Args:
        selector: whose `needs` are collected.
        tower: whose last full-attention layer, `layer`, is looked at.

    Raises:
        TypeError: the selector needs something unknown. ValueError: the tower has no full-attention layer.
    """

    def __init__(self, selector: Selector, tower: TowerShape):
        if unknown := sorted(selector.needs - set(KNOWN)):
            raise TypeError(
                f"method {selector.name} needs {unknown[0]!r}; after the encoder there is {' and '.join(KNOWN)}"
            )
        if not tower.full_layers:
            raise ValueError(f"method {selector.name} needs a full-attention layer, and this tower has none")
        self.layer = max(tower.full_layers)
        self._collected: dict[str, list[torch.Tensor]] = {name: [] for name in sorted(selector.needs)}
        self._seen: dict[str, torch.Tensor] | None = None

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
            layout, groups: of its rows, in frame pairs. bias: whether attention weighs a row by the units that it represents.
        """
        values = {}
        if "attention" in self._collected:
            values["attention"] = attention_received(q, k, groups, bias) * layout.geometry.units
        if "keys" in self._collected:
            values["keys"] = unit_features(plain)
        self._seen = values

    def finish(self, order: torch.Tensor) -> None:
        """Ends a chunk. `order`: int64 `[R]`, its rows by unit."""
        if self._seen is None:  # nothing new in the chunk
            return
        values, self._seen = self._seen, None
        for name, value in values.items():
            self._collected[name].append(value[order])

    def collected(self) -> dict[str, torch.Tensor]:
        """Everything, by name, `[E, ...]`, rows ordered by unit."""
        return {name: torch.cat(pieces) for name, pieces in self._collected.items()}
