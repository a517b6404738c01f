"""Segments of a longer video: what has not changed since the one before is not encoded again.

Such a unit has no row of its own. The row that its place had in the end of the segment before represents it: attention sees its
keys and values in every layer, and after the tower it may become a token, at its place here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from evoprune.methods import EncoderPlan, Stage, arange_on
from evoprune.vision import EncodedRows, EncoderRun, ReferenceBlocks, Rows, encode_rows


class NothingNew(Exception):
    """Say that a segment has no row of its own."""


@dataclass(frozen=True)
class Earlier:
    """Hold what a segment leaves to the next one, for each of P places: of the row that represents its last unit."""

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
    whole = any(stage.whole_pairs for stage in plan.row_stages)
    if not plan.reuse or plan.inside_pairs or whole or (stage and stage.selector and stage.selector.needs):
        return encode_rows(visual, patches, plan, **options), None
    run = SegmentRun(visual, plan, earlier, **options)
    rows = run.encode(patches)
    return rows, run.left


class SegmentRun(EncoderRun):
    """Hold one segment while the tower encodes it; `left` is for the next one."""

    def __init__(self, visual, plan: EncoderPlan, earlier: Earlier | None, **options: Any):
        super().__init__(visual, plan, **options)
        self._earlier = earlier
        self._outside: torch.Tensor | None = None  # bool `[N]`: units that have rows of the segment before
        self._keys_values: dict[int, torch.Tensor] = {}
        self.left: Earlier | None = None
        if earlier:
            self.references = earlier.references

    def embed(self, patches: Iterable[torch.Tensor]) -> Rows:
        rows = super().embed(patches)
        if not len(rows):
            raise NothingNew
        if self._earlier:
            self._outside = rows.unit_to_row >= len(rows)
        return rows

    def select_rows(self, rows: Rows, stage: Stage) -> Rows:
        """Select as the base does, among rows of this segment; units may also have rows of the segment before."""
        if self._outside is None:
            return super().select_rows(rows, stage)
        left = super().select_rows(self._inside(rows), stage)
        outside = len(left) + arange_on(self.plan.units, left.unit_to_row.device) % self.geometry.units
        unit_to_row = torch.where(self._outside, outside, left.unit_to_row)
        return replace(left, unit_to_row=unit_to_row, reach="clip", size_bias=True)

    def _inside(self, rows: Rows) -> Rows:
        """Return the rows without those of the segment before."""
        return replace(rows, unit_to_row=torch.where(self._outside, -1, rows.unit_to_row))

    def visible(self, layer: int, k: torch.Tensor, v: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of a layer, and behind them those of the segment before; keeps those for the next one."""
        both = torch.stack([k, v], 1)
        if self._earlier:
            both = torch.cat([both, self._earlier.keys_values[layer]])
        self._keys_values[layer] = both[rows.unit_to_row[-self.geometry.units :]]
        if self._earlier and rows.reach == "clip":
            return both.unbind(1)
        return k, v

    def finish(self, rows: Rows) -> Rows:
        """Return the rows, and with them rows of the segment before that represent units here, each at the first of these.

        No selection is then the language model's: it is among the rows that were computed.
        """
        if self._outside is not None:
            rows = self._with_earlier(super().finish(self._inside(rows)))
            self.selection = None
        else:
            rows = super().finish(rows)
        last = rows.unit_to_row[-self.geometry.units :]
        references = replace(self.references, pair=torch.full_like(self.references.pair, -1), seen=0)
        self.left = Earlier(references, self._keys_values, rows.values[last], rows.deepstack[last])
        return rows

    def _with_earlier(self, rows: Rows) -> Rows:
        """Return rows by unit, and those of the segment before."""
        outside = self._outside.view(-1, self.geometry.units)
        place = outside.any(0).nonzero()[:, 0]
        rank = torch.zeros_like(outside[0], dtype=torch.int64)
        rank[place] = len(rows) + arange_on(len(place), rank.device)
        first = outside.to(torch.uint8).argmax(0)[place]
        return replace(
            rows,
            values=torch.cat([rows.values, self._earlier.features[place]]),
            deepstack=torch.cat([rows.deepstack, self._earlier.deepstack[place]]),
            unit=torch.cat([rows.unit, first * self.geometry.units + place]),
            unit_to_row=torch.where(outside, rank, rows.unit_to_row.view_as(outside)).flatten(),
        ).by_unit()
