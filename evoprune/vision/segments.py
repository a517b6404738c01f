"""Segments of a longer video: what each takes over from the one before, so that what has not changed is not encoded again.

A unit that has not changed since the segment before has no row of its own. The row that its place had in the end represents it:
attention sees that row's keys and values in every layer, and after the tower the row may become a token, at its place here.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch

from evoprune.methods.plans import EncoderPlan, WholePairs
from evoprune.methods.types import Selection, ascending
from evoprune.vision.chunks import CarriedKeys, Earlier
from evoprune.vision.layout import Geometry, TokenLayout
from evoprune.vision.reuse import ReferenceBlocks


class NothingNew(Exception):
    """A segment of a longer video has no row of its own."""


@dataclass
class VideoRows:
    """Rows of a video, ordered by unit."""

    x: torch.Tensor  # `[E, 4, hidden]`, or `[E, D]` after the patch merger
    deepstack: torch.Tensor  # `[E, n, D]`, of the layers so far; averaged where the rows are
    unit: torch.Tensor  # int64 `[E]`, the unit whose place each row has
    owner: torch.Tensor  # int64 `[N]`, the row that represents each unit, -1 for none


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

    def chunks_done(self, carried: CarriedKeys, owner: torch.Tensor) -> None:
        """Called after the layers that run in chunks; `owner`: int64 `[N]`, -1 for units that have rows of the segment before."""
        self._keys_values |= carried.keys_values
        self._outside = owner < 0 if self.earlier else None

    def enter(self, layout: TokenLayout) -> tuple[TokenLayout, CarriedKeys]:
        """The layout of all rows, in which units also have rows of the segment before; and the keys of these."""
        carried, last = CarriedKeys(self.earlier), ascending(self._units, layout.owner.device)[-self._places :]
        if self._outside is None:
            carried.begin(last)
            return layout, carried
        place = ascending(self._units, layout.owner.device) % self._places
        carried.begin(torch.where(self._outside[last], -1, last))
        return replace(layout, owner=torch.where(self._outside, layout.rows + place, layout.owner)), carried

    def layers_done(self, carried: CarriedKeys, layers: range) -> None:
        """Called after `layers`, which ran on all rows together."""
        self._keys_values |= {layer: carried.keys_values[layer] for layer in layers}

    def joined(self, rows: VideoRows, selection: Selection | None) -> tuple[VideoRows, Selection | None]:
        """The rows after the tower, with those of the segment before that represent units here, each at the first of them.

        `selection`: of the tokens, among the rows that were computed; returned where there are no others.
        """
        if self.earlier:
            rows, selection = self._with_earlier(rows, self._outside.view(-1, self._places)), None
        (seen,), last = self.references, rows.owner[-self._places :]
        references = replace(seen, pair=torch.full_like(seen.pair, -1), seen=0)
        self.left = Earlier(references, self._keys_values, rows.x[last], rows.deepstack[last])
        return rows, selection

    def _with_earlier(self, rows: VideoRows, outside: torch.Tensor) -> VideoRows:
        place = outside.any(0).nonzero()[:, 0]
        rank = torch.zeros_like(outside[0], dtype=torch.int64)
        rank[place] = len(rows.unit) + ascending(len(place), rank.device)
        unit = torch.cat([rows.unit, outside.to(torch.uint8).argmax(0)[place] * self._places + place])
        order = unit.argsort()
        owner = torch.where(outside, rank, rows.owner.view_as(outside)).flatten()
        x = torch.cat([rows.x, self.earlier.features[place]])[order]
        deepstack = torch.cat([rows.deepstack, self.earlier.deepstack[place]])[order]
        return VideoRows(x, deepstack, unit[order], order.argsort()[owner])
