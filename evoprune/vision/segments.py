"""What is carried from chunk to chunk and from segment to segment, so that what has not changed is not encoded again.

Attention of a chunk sees keys and values of the latest row of each place (`CarriedKeys`). A *segment* is a part of a longer video.
A unit that has not changed since the segment before has no row of its own. The row that its place had in the end represents it:
attention sees that row's keys and values in every layer, and after the tower the row may become a token, at its place here.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch

from evoprune.methods.plans import EncoderPlan, WholePairs
from evoprune.methods.types import Selection, ascending
from evoprune.vision.layout import Geometry, TokenLayout
from evoprune.vision.preprocess import ReferenceBlocks


@dataclass
class Rows:
    """Rows of a video, ordered by unit."""

    values: torch.Tensor  # `[E, 4, hidden]`, or `[E, D]` after the patch merger
    deepstack: torch.Tensor  # `[E, n, D]`, of the layers so far; averaged where the rows are
    unit: torch.Tensor  # int64 `[E]`, the unit whose place each row has
    unit_to_row: torch.Tensor  # int64 `[N]`, the row that represents each unit, -1 for none


@dataclass(frozen=True)
class Earlier:
    """What a segment of a longer video leaves to the next one, for each of P places: of the row that represents its last unit."""

    references: ReferenceBlocks  # its pixels
    keys_values: dict[int, torch.Tensor]  # by layer: `[P, 2, 4, heads, d]`
    features: torch.Tensor  # `[P, D]`, after the patch merger
    deepstack: torch.Tensor  # `[P, n, D]`


class CarriedKeys:
    """The latest encoded row of each of P places: its index among all rows, and its keys and values in each layer.

    At first the rows are those of the segment before (`earlier`), which have no index: -1.
    """

    def __init__(self, earlier: Earlier | None = None):
        self._number: torch.Tensor | None = None  # int64 [P]
        self._latest: torch.Tensor | None = None
        self.keys_values: dict[int, torch.Tensor] = {}  # by layer: [P, 2, 4, heads, d]
        if earlier is not None:
            places, self.keys_values = len(earlier.features), dict(earlier.keys_values)
            self._number = torch.full((places,), -1, dtype=torch.int64, device=earlier.features.device)

    def begin(self, latest: torch.Tensor | None) -> None:
        """Starts a chunk; `latest`: from `Chunk.latest`, None if no later chunk follows."""
        self._latest = latest

    def seen_by(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[R or R + P, 4, heads, d]`: a chunk's in `layer`, and the references'; keeps those of later chunks."""
        earlier = self.keys_values.pop(layer, None)
        if earlier is None and self._latest is None:
            return k, v
        both = torch.stack([k, v], 1)
        if earlier is not None:
            both = torch.cat([both, earlier])
        if self._latest is not None:
            stays = len(k) + ascending(layout.geometry.units, k.device) if earlier is not None else 0
            self.keys_values[layer] = both[torch.where(self._latest < 0, stays, layout.unit_to_row[self._latest])]
        return both.unbind(1) if earlier is not None and layout.reach == "clip" else (k, v)

    def among_all(self, unit_to_row: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """`unit_to_row` of the chunk's layout as indices among all rows, of which the chunk's have `number` (int64 `[R]`)."""
        if self._number is not None:
            number = torch.cat([number, self._number])
        unit_to_row = number[unit_to_row]
        if self._latest is not None:
            latest = unit_to_row[self._latest]
            self._number = latest if self._number is None else torch.where(self._latest < 0, self._number, latest)
        return unit_to_row


class NothingNew(Exception):
    """A segment of a longer video has no row of its own."""


class Segment:
    """One segment: what it takes over from the one before (`earlier`), and what it leaves to the next one (`left`).

    `left` is None until it has been encoded, and where the plan reuses nothing or its stages and selector need more than rows.
    """

    def __init__(self, earlier: Earlier | None = None):
        self.earlier, self.left = earlier, None
        self.references: list[ReferenceBlocks] = []  # of reuse; in the end those for the next segment

    def begun(self, plan: EncoderPlan, geo: Geometry) -> Self | None:
        """Itself, before its first chunk; None where it can leave nothing."""
        stage, whole = plan.token_stage, any(isinstance(stage.reduce, WholePairs) for stage in plan.row_stages)
        if not plan.reuse or plan.inside_chunks or whole or (stage and stage.selector and stage.selector.needs):
            return None
        self._units, self._places, self.left = plan.units, geo.units, None
        self.references = [self.earlier.references] if self.earlier else []
        self._keys_values: dict[int, torch.Tensor] = {}
        self._outside: torch.Tensor | None = None  # bool `[N]`: units that have rows of the segment before
        return self

    def chunks_done(self, carried: CarriedKeys, unit_to_row: torch.Tensor) -> None:
        """Called after the layers that run in chunks; `unit_to_row`: int64 `[N]`, -1 for units with rows of the segment before."""
        self._keys_values |= carried.keys_values
        self._outside = unit_to_row < 0 if self.earlier else None

    def enter(self, layout: TokenLayout) -> tuple[TokenLayout, CarriedKeys]:
        """The layout of all rows, in which units also have rows of the segment before; and the keys of these."""
        carried, last = CarriedKeys(self.earlier), ascending(self._units, layout.unit_to_row.device)[-self._places :]
        if self._outside is None:
            carried.begin(last)
            return layout, carried
        place = ascending(self._units, layout.unit_to_row.device) % self._places
        carried.begin(torch.where(self._outside[last], -1, last))
        return replace(layout, unit_to_row=torch.where(self._outside, layout.rows + place, layout.unit_to_row)), carried

    def layers_done(self, carried: CarriedKeys, layers: range) -> None:
        """Called after `layers`, which ran on all rows together."""
        self._keys_values |= {layer: carried.keys_values[layer] for layer in layers}

    def joined(self, rows: Rows, selection: Selection | None) -> tuple[Rows, Selection | None]:
        """The rows after the tower, with those of the segment before that represent units here, each at the first of them.

        `selection`: of the tokens, among the rows that were computed; returned where there are no others.
        """
        if self.earlier:
            rows, selection = self._with_earlier(rows, self._outside.view(-1, self._places)), None
        (seen,), last = self.references, rows.unit_to_row[-self._places :]
        references = replace(seen, pair=torch.full_like(seen.pair, -1), seen=0)
        self.left = Earlier(references, self._keys_values, rows.values[last], rows.deepstack[last])
        return rows, selection

    def _with_earlier(self, rows: Rows, outside: torch.Tensor) -> Rows:
        place = outside.any(0).nonzero()[:, 0]
        rank = torch.zeros_like(outside[0], dtype=torch.int64)
        rank[place] = len(rows.unit) + ascending(len(place), rank.device)
        unit = torch.cat([rows.unit, outside.to(torch.uint8).argmax(0)[place] * self._places + place])
        order = unit.argsort()
        unit_to_row = torch.where(outside, rank, rows.unit_to_row.view_as(outside)).flatten()
        values = torch.cat([rows.values, self.earlier.features[place]])[order]
        deepstack = torch.cat([rows.deepstack, self.earlier.deepstack[place]])[order]
        return Rows(values, deepstack, unit[order], order.argsort()[unit_to_row])
