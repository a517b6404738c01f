"""Encodes a segment of a longer video, skipping units that are unchanged since the previous segment.

An unchanged unit does not get a new row. Instead, it is represented by the row that represented the same frame position at the end
of the previous segment. In every layer, the current segment's rows also attend to the keys and values of these earlier rows. After
the vision tower, an earlier row may become a token in the current segment.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from evoprune.methods import EncoderPlan, Stage, arange_on
from evoprune.vision import EncoderRun, ReferenceBlocks, Rows, TowerOutput, encode_rows


class NothingNew(Exception):
    """Raised if no units in a segment have changed, so there are no rows to encode."""


@dataclass(frozen=True)
class Earlier:
    """State carried over to the next segment: for each of P frame positions, the row of the latest unit at that position."""

    references: ReferenceBlocks  # pixels of the latest unit at each position
    keys_values: dict[int, torch.Tensor]  # `[P, 2, 4, heads, d]` for each layer
    features: torch.Tensor  # `[P, D]`, the output of the patch merger
    deepstack: torch.Tensor  # `[P, n, D]`, the DeepStack features


def encode_segment(
    visual, patches: Iterable[torch.Tensor], plan: EncoderPlan, earlier: Earlier | None, **options: Any
) -> tuple[TowerOutput, Earlier | None]:
    """Encode a segment like `vision.encoder.encode_rows`, and also return the state for the next segment.

    Args:
        earlier: State returned for the previous segment, or None for the first segment.

    Returns:
        The encoded rows and the state for the next segment. If the plan does not reuse units, or if its stages or selector require
        more than rows, `earlier` is ignored and the returned state is None.

    Raises:
        NothingNew: No units have changed since the previous segment.

    For the other exceptions, see `encode_rows`.
    """
    stage = plan.token_stage
    whole = any(stage.whole_pairs for stage in plan.row_stages)
    if not plan.reuse or plan.inside_pairs or whole or (stage and stage.selector and stage.selector.needs):
        return encode_rows(visual, patches, plan, **options), None
    run = SegmentRun(visual, plan, earlier, **options)
    rows = run.encode(patches)
    return rows, run.left


class SegmentRun(EncoderRun):
    """A run of the vision tower on one segment. Afterwards, `left` contains the state for the next segment."""

    def __init__(self, visual, plan: EncoderPlan, earlier: Earlier | None, **options: Any):
        super().__init__(visual, plan, **options)
        self._earlier = earlier
        self._outside: torch.Tensor | None = None  # bool `[N]`: units represented by rows from the previous segment
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
        """Select only among this segment's rows. Units represented by a row from the previous segment keep that row."""
        if self._outside is None:
            return super().select_rows(rows, stage)
        left = super().select_rows(self._inside(rows), stage)
        outside = len(left) + arange_on(self.plan.units, left.unit_to_row.device) % self.geometry.units
        unit_to_row = torch.where(self._outside, outside, left.unit_to_row)
        return replace(left, unit_to_row=unit_to_row, reach="clip", size_bias=True)

    def _inside(self, rows: Rows) -> Rows:
        """Return this segment's rows, with row index -1 for units represented by a row from the previous segment."""
        return replace(rows, unit_to_row=torch.where(self._outside, -1, rows.unit_to_row))

    def visible(self, layer: int, k: torch.Tensor, v: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the previous segment's keys and values to a layer's own keys and values.

        The keys and values of the last frame pair are stored for the next segment.
        """
        both = torch.stack([k, v], 1)
        if self._earlier:
            both = torch.cat([both, self._earlier.keys_values[layer]])
        self._keys_values[layer] = both[rows.unit_to_row[-self.geometry.units :]]
        if self._earlier and rows.reach == "clip":
            return both.unbind(1)
        return k, v

    def finish(self, rows: Rows) -> Rows:
        """Return this segment's rows together with the rows carried over from the previous segment.

        A carried-over row is placed at the first unit that it represents in this segment. If there is any state from an earlier
        segment, `selection` is set to None, because it covers only the rows computed in this segment and would be useless to the
        language model.
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
        """Merge this segment's rows with the rows carried over from the previous segment, and sort them by unit."""
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
