"""What happens after layers of the tower: a hook changes rows, as methods between layers do, or notes what a selector needs."""

from collections.abc import Callable

import torch

from evoprune.methods import Selector, TowerShape
from evoprune.vision.rows import Rows

KNOWN = ("attention", "keys", "middle")
MIDDLE = 7 / 32, 23 / 32  # the layers of "middle", in relative depth: those of Nuwa (arXiv 2602.02951)
# The attention that a row receives, computed apart in float32, where "attention" is a by-product of the layer's own.
PRECISE = "precise attention"


class Hook:
    """Is called before the first layer and after each one, for one video. By itself it does nothing."""

    def needs(self, done: int) -> frozenset[str]:
        """Return what it reads of the last of `done` layers: "keys" before rotary, "keys_rotary", "attention", `PRECISE`."""
        return frozenset()

    def __call__(self, done: int, rows: Rows, seen: dict[str, torch.Tensor]) -> Rows:
        """Return the rows for the next layer, from those after `done` layers.

        `seen`: what it needs of the last one, of the rows that it had: keys as features, float32 `[R, 4 * d]`; attention received,
        float32 `[R]`.
        """
        return rows


class Look(Hook):
    """Notes attention and keys of the tower's last full-attention layer for a selector."""

    def __init__(self, needs: frozenset[str], tower: TowerShape):
        self._done = max(tower.full_layers) + 1
        self._needs = needs

    def needs(self, done: int) -> frozenset[str]:
        if done != self._done:
            return frozenset()
        names = {"attention": PRECISE, "keys": "keys"}
        return frozenset(names[name] for name in names.keys() & self._needs)

    def __call__(self, done: int, rows: Rows, seen: dict[str, torch.Tensor]) -> Rows:
        if done == self._done:
            if "attention" in self._needs:
                rows.given["attention"] = seen[PRECISE] * rows.geometry.units
            if "keys" in self._needs:
                rows.given["keys"] = seen["keys"]
        return rows


class Middle(Hook):
    """Notes the mean of the states after the layers in the middle of the tower, float32, after the patch merger.

    `merge`: the patch merger, from float32 `[R, 4, hidden]` to `[R, D]`.
    """

    def __init__(self, tower: TowerShape, merge: Callable[[torch.Tensor], torch.Tensor]):
        first, last = (min(round(share * tower.depth), tower.depth - 1) for share in MIDDLE)
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


def looks(
    selector: Selector, tower: TowerShape, merge: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[list[Hook], list[Hook]]:
    """Return the hooks that note what a selector needs, before the others and after them; `merge` as in `Middle`.

    Raises TypeError: the selector needs something unknown. ValueError: the tower has no full-attention layer.
    """
    if unknown := sorted(selector.needs - set(KNOWN)):
        known = f"after the encoder there is {', '.join(KNOWN)}"
        raise TypeError(f"method {selector.name} needs {unknown[0]!r}; {known}")
    if not tower.full_layers:
        raise ValueError(f"method {selector.name} needs a full-attention layer, and this tower has none")
    after = []
    if "middle" in selector.needs:
        after.append(Middle(tower, merge))
    return [Look(selector.needs, tower)], after
