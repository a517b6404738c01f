"""Hooks that run after vision tower layers, either to change rows for a pruning method or to record data for a selector."""

from collections.abc import Callable

import torch

from evoprune.methods import Selector, TowerShape
from evoprune.vision.attention import PRECISE_ATTENTION
from evoprune.vision.rows import Rows

SELECTOR_DATA = ("attention", "keys", "middle")
MIDDLE_LAYERS = (
    7 / 32,
    23 / 32,
)  # relative depths of the first and last "middle" layers, as in Nuwa (arXiv 2602.02951)


class Hook:
    """Base class for hooks, which the encoder calls before the first layer and after each layer of a video.

    The base class does nothing.
    """

    def needs(self, done: int) -> frozenset[str]:
        """Return the names of the data that this hook needs from the preceding layer.

        `done` is the number of finished layers, including the preceding layer. The possible names are "keys" (before rotary),
        "keys_rotary", "attention" and `PRECISE_ATTENTION`.
        """
        return frozenset()

    def __call__(self, done: int, rows: Rows, seen: dict[str, torch.Tensor]) -> Rows:
        """Run the hook and return the rows for the next layer.

        Args:
            done: The number of layers that have run so far.
            rows: The output rows of the most recent layer.
            seen: The data from the most recent layer requested by `needs`, by name. Keys are float32 `[R, 4 * d]`, averaged over
                heads, with the four patches concatenated. Received attention is float32 `[R]`.
        """
        return rows


class LastLayerData(Hook):
    """A hook that records attention and keys from the vision tower's last full-attention layer for a selector."""

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
    """A hook that averages rows over the vision tower's middle layers for a selector, and applies the patch merger to the mean.

    Args:
        merge: The patch merger, which takes float32 `[R, 4, hidden]` and returns `[R, D]`.
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
    """Return the hooks that record data for a selector, as two lists: hooks to run first and hooks to run last.

    Args:
        merge: See `MiddleLayerMean`.

    Raises:
        TypeError: If the selector needs data that the encoder doesn't provide.
        ValueError: If the vision tower has no full-attention layer.
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
