"""The encoder's rows of a video, computed once for all methods and budgets with the same work in the tower.

Methods that act after the encoder, and selections that follow a method inside it, differ only in the rows that they select.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

import torch

from evoprune.methods.base import Method
from evoprune.vision.encoder import Unchosen, encode_rows

# Encodings held: enough for the selections behind `evoprune`, which need attention, keys, both or nothing, at three budgets,
# whatever other methods run between them.
HELD = 32


class SharedRows:
    """Of one video, in one model."""

    def __init__(self):
        self._held: OrderedDict[tuple, Unchosen] = OrderedDict()

    def encode_rows(
        self, visual, patches: Iterable[torch.Tensor], grid: tuple[int, int, int], method: Method, keep: int, **how
    ) -> Unchosen:
        """As `vision.encoder.encode_rows`."""
        count, height, width = grid
        budget = keep / (count * height * width)
        tower = (method.merger, keep) if method.merges(budget) else None
        needs = method.needs_after if method.chooses(budget) else None
        key = (grid, tower, needs, *sorted(how.items()))
        if key in self._held:
            for _ in patches:  # the reader of the patches counts damaged frames
                pass
            self._held.move_to_end(key)
        else:
            self._held[key] = encode_rows(visual, patches, grid, method, keep, **how)
            if len(self._held) > HELD:
                self._held.popitem(last=False)
        rows = self._held[key]
        return replace(rows, method=method, keep=keep, watch=rows.watch.copy())  # each caller adds its own times
