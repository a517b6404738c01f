"""The pruned vision encoder: embed, run layers, select rows, run the other layers, merge patches.

A video comes in as patches, frame pair after frame pair, and is encoded in chunks of whole frame pairs: no layer of the tower looks
across them, except at reused rows, of which keys and values are kept. So memory stays constant, and the result does not depend on
the chunk size. Without pruning the output is Hugging Face's, up to rounding.

Where the plan selects rows inside the tower, it selects among all of the video. From there on all of it goes together, as many rows
as were selected, and what they are selected from is held until then.

The plan knows how many rows every layer computes, so on a GPU every shape is known too. The host waits for a result only where rows
are selected, and at the end, when all checks are read.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from evoprune.errors import UsageError
from evoprune.methods.base import Method
from evoprune.model.numerics import all_numbers, not_a_number_error
from evoprune.pruning.plan import EncoderPlan
from evoprune.pruning.types import Selection, Tokens
from evoprune.vision import devices
from evoprune.vision.chunks import Chunk, in_chunks
from evoprune.vision.encoded import Encoded
from evoprune.vision.families import family
from evoprune.vision.gather import Gathering
from evoprune.vision.layout import TokenLayout, selected_layout
from evoprune.vision.reduce import Merging
from evoprune.vision.references import References
from evoprune.vision.rows import Checks, EncodedRows, all_true, select_tokens
from evoprune.vision.timer import Timer
from evoprune.vision.tower import Passage, embed, merge_patches, run_layers, tower_geometry, tower_shape

OnLayer = Callable[[int, int], None]


def encode(
    visual,
    patches: Iterable[torch.Tensor],
    plan: EncoderPlan,
    method: Method,
    *,
    question: torch.Tensor | None = None,
    seconds_per_pair: float = 1.0,
    seed: int = 0,
    chunk_units: int | None = None,
) -> Encoded:
    """Encodes one video.

    Args:
        visual: the tower's weights, a `weights.Tower`, or transformers' of Qwen2.5-VL or Qwen2-VL.
        patches: pieces of `[rows, 1176]` in Hugging Face's order that add up to the whole video.
        plan: from `method.plan` for this tower.
        method: the pruning method.
        question: `[Q, D]`, embeddings of its tokens, for a method that reads it.
        seconds_per_pair, seed: passed on to the method.
        chunk_units: rows to encode at a time, rounded up to whole frame pairs; default: `devices.units_at_a_time`.

    Raises:
        ValueError: `patches` do not add up to the grid.
        UsageError: the method reads the question, and there is none.
        ModelError: what the tower computes is not finite.
    """
    if method.reads_question and plan.prunes and question is None:
        raise UsageError(
            f"method {method.name} reads the question, and there is none here",
            "give the question with the video, or choose a method that does without",
        )
    how = {"seconds_per_pair": seconds_per_pair, "seed": seed, "chunk_units": chunk_units}
    return select_tokens(encode_rows(visual, patches, plan, method, **how), question)


@torch.inference_mode()
def encode_rows(
    visual,
    patches: Iterable[torch.Tensor],
    plan: EncoderPlan,
    method: Method,
    *,
    seconds_per_pair: float = 1.0,
    seed: int = 0,
    chunk_units: int | None = None,
    on_layer: OnLayer = lambda done, total: None,
) -> EncodedRows:
    """The part of `encode` that depends on no question; arguments as there.

    Args:
        on_layer: called with the number of layers done and in all, where all of the video goes through some of them together: that
            begins only when the last of the patches has come.
    """
    run = _Run(visual, plan, method, chunk_units, on_layer)
    for chunk in run.chunks(patches):
        x, layout = run.embedded(chunk)
        x, layout = run.first_layers(chunk, x, layout)
        run.collect(chunk, x, layout)
    rows, selection = run.collected(), None
    if plan.select_after is not None:
        rows, selection = run.selected(rows, seconds_per_pair, seed)
        rows = run.last_layers(rows)
    tokens = Tokens(rows.x, rows.owner, plan.grid, seconds_per_pair, seed, run.given())
    return EncodedRows(
        method, plan, tokens, rows.unit, torch.cat(run.sources), run.layers, selection, run.timer, run.checks
    )


@dataclass
class _Rows:
    """All rows of a video, by unit: `x` `[E, 4, hidden]`, or `[E, D]` behind the patch merger; the rest as in `EncodedRows`."""

    x: torch.Tensor
    unit: torch.Tensor
    owner: torch.Tensor


class _Run:
    """One video on its way through the tower."""

    def __init__(self, visual, plan: EncoderPlan, method: Method, chunk_units: int | None, on_layer: OnLayer):
        weight, tower = visual.patch_embed.proj.weight, tower_shape(visual)
        self.visual, self.plan, self.method, self.depth = visual, plan, method, tower.depth
        self.device, self.dtype = weight.device, weight.dtype
        self.geometry = tower_geometry(visual, *plan.grid[1:])
        self.at_once = chunk_units or devices.units_at_a_time(self.device)
        self.on_layer = on_layer
        self.first = range(tower.depth if plan.select_after is None else plan.select_after)
        self.timer, self.checks = Timer(self.device), Checks()
        self.references = References() if plan.reuse else None
        selector = method.selector if plan.prunes else None
        self.gathering = Gathering(selector, tower) if selector and selector.needs else None
        if self.gathering and plan.select_after is not None:
            raise TypeError(f"method {method.name} selects between layers, so it is given nothing but the rows")
        self.computed = [0] * tower.depth
        self.pieces: list[_Rows] = []
        self.sources: list[torch.Tensor] = []
        self.count = 0

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Each layer's number and the rows that it computed."""
        return list(enumerate(self.computed))

    def chunks(self, patches: Iterable[torch.Tensor]) -> Iterator[Chunk]:
        """Whole frame pairs, as many as go through the tower together."""
        return in_chunks(
            patches,
            self.geometry,
            self.plan.grid[0],
            rows=self.at_once,
            threshold=self.plan.reuse,
            dtype=self.dtype,
            timer=self.timer,
            even=self.checks.even if self.plan.prunes else None,
        )

    def embedded(self, chunk: Chunk) -> tuple[torch.Tensor, TokenLayout]:
        """The chunk's rows as the first layer takes them, and their layout."""
        with devices.here(self.device):  # all bookkeeping lives beside the features
            with self.timer if self.references else nullcontext():
                layout, latest = chunk.layout(self.geometry)
            if self.references:
                follows = chunk.first + chunk.pairs < self.plan.grid[0]
                self.references.begin(latest if follows else None)  # nobody will refer to the last chunk
            return embed(self.visual, devices.to_device(chunk.patches, self.device)), layout

    def first_layers(self, chunk: Chunk, x: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, TokenLayout]:
        """The layers before the selection, or all of them."""
        merger, merging = self.method.merger, None
        if self.plan.merged:
            merging = Merging(merger, self.plan.merged[chunk.first : chunk.first + chunk.pairs], self.checks.failed)
        for layer in self.first:
            before = layout.rows if not (merging and layer) else sum(merging.target(layer - 1))
            self.computed[layer] += before
        passage = Passage(
            self.visual, self.timer, merging, self.references, self.gathering, merger.size_bias if merging else True
        )
        with devices.here(self.device):
            return run_layers(passage, self.first, x, layout)

    def collect(self, chunk: Chunk, x: torch.Tensor, layout: TokenLayout) -> None:
        """Puts a chunk's rows behind those of the chunks before it; merges their patches if no layer follows."""
        with devices.here(self.device):
            order = layout.unit.argsort()
            if self.gathering:
                with self.timer:
                    self.gathering.finish(order)
            number = order.argsort() + self.count  # of each row among all rows
            owner = self.references.owners(layout.owner, number) if self.references else number[layout.owner]
            rows = x[order]
            if layout.rows and self.plan.select_after is None:
                rows = merge_patches(self.visual, rows)
            self._check_finite(rows)
        self.pieces.append(_Rows(rows, layout.unit[order] + chunk.first * self.geometry.units, owner))
        own = torch.arange(chunk.first, chunk.first + chunk.pairs)[:, None].expand(-1, self.geometry.units)
        self.sources.append(own if chunk.source is None else chunk.source)
        self.count += len(order)

    def collected(self) -> _Rows:
        """The rows of all chunks; the chunks are let go."""
        live = [rows.x for rows in self.pieces if len(rows.x)]
        units, owners = [rows.unit for rows in self.pieces], [rows.owner for rows in self.pieces]
        self.pieces, self.references = [], None
        return _Rows(torch.cat(live), torch.cat(units), torch.cat(owners))

    def selected(self, rows: _Rows, seconds_per_pair: float, seed: int) -> tuple[_Rows, Selection | None]:
        """The rows that go through the other layers, and their selection if it is what the language model will read.

        Rows are compared as the next layer takes them in, after its norm, which leaves little of the few channels that are large in
        all rows. A picture that stands still is left whole where the plan allows: each row has seen all that surrounds it.
        """
        if not all_true(self.checks.finite):
            raise not_a_number_error("encode")
        plan, selector = self.plan, self.method.selector
        by_pair = rows.owner.view(plan.grid[0], -1)
        if plan.selected >= len(rows.x) and (by_pair == by_pair[0]).all():
            return rows, None
        with devices.here(self.device), self.timer:
            norm = self.visual.blocks[plan.select_after].norm1
            seen = family(self.visual).norm(norm, rows.x).flatten(1)
            tokens = Tokens(seen, rows.owner, plan.grid, seconds_per_pair, seed)
            found = selector.select(tokens, min(plan.selected, len(rows.x)))
            means = found.features(rows.x.flatten(1), rows.owner).view(-1, *rows.x.shape[1:])
        final = selector.suffices(len(found.kept), plan.keep, plan.units)
        return _Rows(means, found.kept, found.owner), found if final else None

    def last_layers(self, rows: _Rows) -> _Rows:
        """The layers after the selection, on all of the video at once; the patch merger on a part of it at a time."""
        after = range(self.plan.select_after, self.depth)
        self.computed[after.start :] = [len(rows.unit)] * len(after)
        with devices.here(self.device):
            layout, order = selected_layout(self.geometry, self.plan.grid[0], rows.unit, rows.owner)
            passage = Passage(
                self.visual,
                self.timer,
                mlp_rows=self.at_once,
                on_layer=lambda done: self.on_layer(done, self.depth),
            )
            x, rows.x = rows.x[order], None
            x, _ = run_layers(passage, after, x, layout)
            some = x[order.argsort()].split(self.at_once)
            tokens = torch.cat([merge_patches(self.visual, piece) for piece in some])
            self.checks.finite.append(all_numbers(tokens))
        return _Rows(tokens, rows.unit, rows.owner)

    def given(self) -> dict[str, torch.Tensor]:
        """What the selector asked for."""
        return self.gathering.collected() if self.gathering else {}

    def _check_finite(self, rows: torch.Tensor) -> None:
        if not len(rows):
            return
        self.checks.finite.append(all_numbers(rows))
        if not devices.static_shapes(self.device) and not self.checks.finite[-1]:
            raise not_a_number_error("encode")
