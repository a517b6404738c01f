"""Collects the inputs that selectors declare from the tower's last full-attention layer."""

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.encoder_plan import TowerShape
from evoprune.pruning.score import unit_features
from evoprune.vision.buckets import Bucket, Packed
from evoprune.vision.layout import TokenLayout
from evoprune.vision.received import attention_received

KNOWN = ("attention", "keys")


class Gathering:
    """Collects what a selector needs, chunk after chunk.

    Args:
        selector: its `needs` are collected.
        tower: the values come from its last full-attention layer, `layer`.

    Raises:
        TypeError: the selector needs something unknown.
        ValueError: the tower has no full-attention layer.
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
        """Computes the values of one chunk, in that layer.

        Args:
            q: `[R, 4, heads, d]` and k: `[R or more, 4, heads, d]`, after rotary.
            plain: `[R, 4, heads, d]`, keys before rotary.
            layout, groups: of the chunk's rows, with frame pairs as groups.
            bias: whether attention weighs a row by its cluster size.
        """
        values = {}
        if "attention" in self._collected:
            values["attention"] = attention_received(q, k, groups, bias) * layout.geometry.units
        if "keys" in self._collected:
            values["keys"] = unit_features(plain)
        self._seen = values

    def finish(self, order: torch.Tensor) -> None:
        """Stores the values of a chunk; `order`, int64 `[R]`, sorts its rows by unit."""
        if self._seen is None:  # the chunk has no rows
            return
        values, self._seen = self._seen, None
        for name, value in values.items():
            self._collected[name].append(value[order])

    def collected(self) -> dict[str, torch.Tensor]:
        """The values of the whole video by name, float32 `[E, ...]`, rows ordered by unit."""
        return {name: torch.cat(pieces) for name, pieces in self._collected.items()}
