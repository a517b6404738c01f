"""Collects the inputs that selectors declare from the tower: from its last full-attention layer, or from its middle."""

from collections.abc import Callable

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.encoder_plan import TowerShape
from evoprune.pruning.ranking import unit_features
from evoprune.vision.attention import attention_received
from evoprune.vision.buckets import Bucket, Packed
from evoprune.vision.layout import TokenLayout

KNOWN = ("attention", "keys", "middle")
MIDDLE = 7 / 32, 23 / 32  # the layers of "middle", in relative depth: those of Nuwa (arXiv 2602.02951)


class Gathering:
    """Collects what a selector needs, chunk after chunk.

    `selector`: its `needs` are collected, attention and keys from the tower's last full-attention layer; `merge`: the patch merger,
    from float32 `[R, 4, hidden]` to `[R, D]`.

    Raises:
        TypeError: the selector needs something unknown.
        ValueError: the tower has no full-attention layer.
    """

    def __init__(self, selector: Selector, tower: TowerShape, merge: Callable[[torch.Tensor], torch.Tensor]):
        if unknown := sorted(selector.needs - set(KNOWN)):
            raise TypeError(
                f"method {selector.name} needs {unknown[0]!r}; after the encoder there is {', '.join(KNOWN)}"
            )
        if not tower.full_layers:
            raise ValueError(f"method {selector.name} needs a full-attention layer, and this tower has none")
        self.layer = max(tower.full_layers)  # that is looked at
        first, last = (min(round(share * tower.depth), tower.depth - 1) for share in MIDDLE)
        # After which states are added
        self.middle = range(first, last + 1) if "middle" in selector.needs else range(0)
        self._merge = merge
        self._states: torch.Tensor | None = None
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
        spread: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Computes the values of one chunk, in that layer; `q`, `k`, `groups`, `bias` as in `attention_received`, of frame pairs.

        `plain`: `[R, 4, heads, d]`, keys before rotary; `spread`: the values of all rows of the chunk, of those of the layer.
        """
        values = {}
        if "attention" in self._collected:
            values["attention"] = attention_received(q, k, groups, bias) * layout.geometry.units
        if "keys" in self._collected:
            values["keys"] = unit_features(plain)
        self._seen = {name: spread(value) for name, value in values.items()}

    def add_states(self, x: torch.Tensor) -> None:
        """Adds the rows of one chunk after one of the layers `middle`, `[R, 4, hidden]`, to the states of which it is the mean."""
        share = x.float() / len(self.middle)
        self._states = share if self._states is None else self._states + share

    def finish(self, order: torch.Tensor) -> None:
        """Stores the values of a chunk; `order`, int64 `[R]`, sorts its rows by unit."""
        if self._seen is None:  # the chunk has no rows
            return
        values, self._seen = self._seen, None
        if self._states is not None:
            values["middle"], self._states = self._merge(self._states).float(), None
        for name, value in values.items():
            self._collected[name].append(value[order])

    def collected(self) -> dict[str, torch.Tensor]:
        """The values of the whole video by name, float32 `[E, ...]`, rows ordered by unit."""
        return {name: torch.cat(pieces) for name, pieces in self._collected.items()}
