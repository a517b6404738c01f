"""Segments of a longer video: what has not changed since the one before is not encoded again.

Such a unit has no row of its own. The row that its place had in the end of the segment before represents it: attention sees its
keys and values in every layer, and after the tower it may become a token, at its place here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from evoprune.methods.plans import EncoderPlan, Stage, WholePairs
from evoprune.methods.types import Selection, arange_on
from evoprune.vision.encoder import EncodedRows, EncoderRun, encode_rows
from evoprune.vision.layout import TokenLayout
from evoprune.vision.preprocess import ReferenceBlocks
from evoprune.vision.rows import Rows


class NothingNew(Exception):
    """A segment has no row of its own."""


@dataclass(frozen=True)
class Earlier:
    """What a segment leaves to the next one, for each of P places: of the row that represents its last unit."""

    references: ReferenceBlocks  # its pixels
    keys_values: dict[int, torch.Tensor]  # by layer: `[P, 2, 4, heads, d]`
    features: torch.Tensor  # `[P, D]`, after the patch merger
    deepstack: torch.Tensor  # `[P, n, D]`


def encode_segment(
    visual, patches: Iterable[torch.Tensor], plan: EncoderPlan, earlier: Earlier | None, **options: Any
) -> tuple[EncodedRows, Earlier | None]:
    """Encodes a segment as `vision.encoder.encode_rows` does a video, and returns also what it leaves to the next one.

    `earlier`: what the one before has left. None is left where the plan reuses nothing, or its stages and selector need more than
    rows; then nothing is taken over.

    Raises NothingNew: no unit has changed since the segment before. Other errors as of `encode_rows`.
    """
    stage = plan.token_stage
    whole = any(isinstance(stage.reduce, WholePairs) for stage in plan.row_stages)
    if not plan.reuse or plan.inside_pairs or whole or (stage and stage.selector and stage.selector.needs):
        return encode_rows(visual, patches, plan, **options), None
    run = SegmentRun(visual, plan, earlier, **options)
    rows = run.encode(patches)
    return rows, run.left


class SegmentRun(EncoderRun):
    """One segment while the tower encodes it; `left` is for the next one."""

    def __init__(self, visual, plan: EncoderPlan, earlier: Earlier | None, **options: Any):
        super().__init__(visual, plan, **options)
        self._earlier = earlier
        self._outside: torch.Tensor | None = None  # bool `[N]`: units that have rows of the segment before
        self._keys_values: dict[int, torch.Tensor] = {}
        self.left: Earlier | None = None
        if earlier:
            self.references = earlier.references

    def embed(self, patches: Iterable[torch.Tensor]) -> tuple[Rows, TokenLayout]:
        rows, layout = super().embed(patches)
        if not layout.rows:
            raise NothingNew
        if self._earlier:
            self._outside = layout.unit_to_row >= layout.rows
            rows.unit_to_row = torch.where(self._outside, -1, layout.unit_to_row)
        return rows, layout

    def layout_of(self, rows: Rows, stage: Stage) -> TokenLayout:
        """As in the base, but units may also have rows of the segment before."""
        layout = super().layout_of(rows, stage)
        if self._outside is None:
            return layout
        outside = layout.rows + arange_on(self.plan.units, layout.unit_to_row.device) % self.geometry.units
        return replace(layout, unit_to_row=torch.where(self._outside, outside, layout.unit_to_row))

    def visible(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of a layer, and behind them those of the segment before; keeps those for the next one."""
        both = torch.stack([k, v], 1)
        if self._earlier:
            both = torch.cat([both, self._earlier.keys_values[layer]])
        self._keys_values[layer] = both[layout.unit_to_row[-self.geometry.units :]]
        return both.unbind(1) if self._earlier and layout.reach == "clip" else (k, v)

    def finish(self, rows: Rows, selection: Selection | None) -> tuple[Rows, Selection | None]:
        """Return the rows with those of the segment before that represent units here, each at the first of them.

        `selection`: of the tokens, among the rows that were computed; returned where there are no others.
        """
        places = self.geometry.units
        if self._earlier:
            rows = self._with_earlier(rows, self._outside.view(-1, places))
            selection = None
        last = rows.unit_to_row[-places:]
        references = replace(self.references, pair=torch.full_like(self.references.pair, -1), seen=0)
        self.left = Earlier(references, self._keys_values, rows.values[last], rows.deepstack[last])
        return rows, selection

    def _with_earlier(self, rows: Rows, outside: torch.Tensor) -> Rows:
        """`outside`: bool `[T, P]`."""
        place = outside.any(0).nonzero()[:, 0]
        rank = torch.zeros_like(outside[0], dtype=torch.int64)
        rank[place] = len(rows.unit) + arange_on(len(place), rank.device)
        first = outside.to(torch.uint8).argmax(0)[place]
        unit = torch.cat([rows.unit, first * self.geometry.units + place])
        unit_to_row = torch.where(outside, rank, rows.unit_to_row.view_as(outside)).flatten()
        values = torch.cat([rows.values, self._earlier.features[place]])
        deepstack = torch.cat([rows.deepstack, self._earlier.deepstack[place]])
        return Rows(values, deepstack, unit, unit_to_row).by_unit()[0]
