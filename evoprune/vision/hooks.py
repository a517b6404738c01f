"""Hooks that run after layers of the tower, to change rows for a method or to record data for a selector."""

from collections.abc import Callable

import torch

from evoprune.methods import Selector, TowerShape
from evoprune.vision.rows import Rows

SELECTOR_DATA = ("attention", "keys", "middle")
MIDDLE_LAYERS = (
    7 / 32,
    23 / 32,
)  # relative depths of the first and the last layer of "middle", as in Nuwa (arXiv 2602.02951)
# The attention that a row receives, computed separately in float32, whereas "attention" is a by-product of the layer's own
# computation.
PRECISE_ATTENTION = "precise attention"


class Hook:
    """A function called before the first layer and after every layer, for one video. The base class does nothing."""

    def needs(self, done: int) -> frozenset[str]:
        """Return the names of the data that this hook needs from the last of `done` finished layers.

        The possible names are "keys" (before rotary), "keys_rotary", "attention" and `PRECISE_ATTENTION`.
        """
        return frozenset()

    def __call__(self, done: int, rows: Rows, seen: dict[str, torch.Tensor]) -> Rows:
        """Return the rows for the next layer.

        Args:
            done: number of finished layers.
            rows: the rows after the last finished layer.
            seen: the data requested by `needs` for the rows of the last finished layer: keys as features, float32 `[R, 4 * d]`;
                received attention, float32 `[R]`.
        """
        return rows


class LastLayerData(Hook):
    """Record the attention and keys of the tower's last full-attention layer for a selector."""

    def __init__(self, needs: frozenset[str], tower: TowerShape):
        self._done = max(tower.full_layers) + 1
        self._needs = needs

    def needs(self, done: int) -> frozenset[str]:
        if done != self._done:
            return frozenset()
        names = {"attention": PRECISE_ATTENTION, "keys": "keys"}
        return frozenset(names[name] for name in names.keys() & self._needs)

    def __call__(self, done: int, rows: Rows, seen: dict[str, torch.Tensor]) -> Rows:
        if done == self._done:
            if "attention" in self._needs:
                rows.given["attention"] = seen[PRECISE_ATTENTION] * rows.geometry.units
            if "keys" in self._needs:
                rows.given["keys"] = seen["keys"]
        return rows


class MiddleLayerMean(Hook):
    """Record the mean of the hidden states after the tower's middle layers, passed through the patch merger, in float32.

    Args:
        merge: the patch merger, from float32 `[R, 4, hidden]` to `[R, D]`.
    """

    def __init__(self, tower: TowerShape, merge: Callable[[torch.Tensor], torch.Tensor]):
        first, last = (min(round(share * tower.depth), tower.depth - 1) for share in MIDDLE_LAYERS)
        self._after = range(first + 1, last + 2)
        self._merge = merge

    def __call__(self, done: int, rows: Rows, seen: dict[str, torch.Tensor]) -> Rows:
        if done in self._after:
            share = rows.whole().values.float() / len(self._after)
            if "middle" in rows.given:
                share = rows.given["middle"] + share
            rows.given["middle"] = share
        if done == self._after[-1]:
            rows.given["middle"] = self._merge(rows.given["middle"]).float()
        return rows


def selector_hooks(
    selector: Selector, tower: TowerShape, merge: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[list[Hook], list[Hook]]:
    """Return the hooks that record data for a selector: those to run before the other hooks, and those to run after them.

    Args:
        merge: see `MiddleLayerMean`.

    Raises:
        TypeError: the selector needs unknown data.
        ValueError: the tower has no full-attention layer.
    """
    if unknown := sorted(selector.needs - set(SELECTOR_DATA)):
        known = f"the encoder provides {', '.join(SELECTOR_DATA)}"
        raise TypeError(f"method {selector.name} needs {unknown[0]!r}; {known}")
    if not tower.full_layers:
        raise ValueError(f"method {selector.name} needs a full-attention layer, but this tower has none")
    after = []
    if "middle" in selector.needs:
        after.append(MiddleLayerMean(tower, merge))
    return [LastLayerData(selector.needs, tower)], after
