"""The encoder's rows of a video, computed once for all methods and budgets that would have the tower do the same.

Methods that act after the encoder, and the choices that can be put behind one that acts inside it, differ only in what they pick.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

import torch

from evoprune.methods.base import Method
from evoprune.vision.encoder import Unchosen, encode_rows

# Encodings: so many that at three budgets the choices behind `evoprune`, which need attention, keys, both or nothing, share theirs,
# whatever comes between them.
HELD = 32


class SharedRows:
    """Of one video, in one model."""

    def __init__(self):
        self._held: OrderedDict[tuple, Unchosen] = OrderedDict()

    def encode_rows(
        self, visual, patches: Iterable[torch.Tensor], grid: tuple[int, int, int], method: Method, keep: int, **how
    ) -> Unchosen:
        """As the function of that name."""
        count, height, width = grid
        budget = keep / (count * height * width)
        tower = (method.merger, keep) if method.merges(budget) else None
        needs = method.needs_after if method.chooses(budget) else None
        key = (grid, tower, needs, *sorted(how.items()))
        if key in self._held:
            for _ in patches:  # who reads them counts what is damaged
                pass
            self._held.move_to_end(key)
        else:
            self._held[key] = encode_rows(visual, patches, grid, method, keep, **how)
            if len(self._held) > HELD:
                self._held.popitem(last=False)
        rows = self._held[key]
        return replace(rows, method=method, keep=keep, watch=rows.watch.copy())  # each with a time of its own
