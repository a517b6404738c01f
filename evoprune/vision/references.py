"""The rows of earlier chunks that reused units refer to. Their number is constant: one per place."""

import torch

from evoprune.pruning.indices import ascending
from evoprune.vision.layout import TokenLayout


class References:
    """The latest encoded row of each of P places: its index among all rows, and its keys and values in each layer."""

    def __init__(self):
        self._number: torch.Tensor | None = None  # int64 [P]
        self._latest: torch.Tensor | None = None
        self._keys_values: dict[int, torch.Tensor] = {}  # by layer: [P, 2, 4, heads, d]

    def begin(self, latest: torch.Tensor | None) -> None:
        """Starts a chunk.

        Args:
            latest: int64 `[P]`, the unit of this chunk that becomes the reference of each place, -1 where the reference does not
                change; None if no later chunk follows.
        """
        self._latest = latest

    def seen_by(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends the references' keys and values to those of a chunk, and keeps the references of later chunks.

        Args:
            layer: the layer of the tower.
            k, v: `[R, 4, heads, d]`, of the chunk's rows.
            layout: of the chunk's rows.

        Returns:
            Keys and values `[R or R + P, 4, heads, d]`.
        """
        earlier = self._keys_values.pop(layer, None)
        if earlier is None and self._latest is None:
            return k, v
        both = torch.stack([k, v], 1)
        if earlier is not None:
            both = torch.cat([both, earlier])
        if self._latest is not None:
            stays = len(k) + ascending(layout.geometry.units, k.device) if earlier is not None else 0
            self._keys_values[layer] = both[torch.where(self._latest < 0, stays, layout.owner[self._latest])]
        return both.unbind(1) if earlier is not None and layout.reach == "clip" else (k, v)

    def owners(self, owner: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """int64, like `owner`: for each unit of the chunk, the index among all rows of the row that represents it.

        Args:
            owner: int64, of the chunk's layout.
            number: int64 `[R]`, the index among all rows of each of the chunk's rows.
        """
        if self._number is not None:
            number = torch.cat([number, self._number])
        owner = number[owner]
        if self._latest is not None:
            latest = owner[self._latest]
            self._number = latest if self._number is None else torch.where(self._latest < 0, self._number, latest)
        return owner
