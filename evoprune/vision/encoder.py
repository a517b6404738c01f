"""The pruned vision encoder: embed, run layers, select rows, run the other layers, merge patches.

The patches of a video arrive frame pair after frame pair and are encoded in chunks of whole frame pairs. Until a selection,
a layer reads nothing outside a frame pair but keys and values of reused rows, which are kept. So the layers' memory does not
grow with the video, and the result does not depend on the chunk size. Without pruning the output is Hugging Face's, up to rounding.

The plan's stages say where rows are left behind. A selection covers the whole video: one row of each unit that was encoded is
held until then, and the selected rows go through the following layers together, or, if frame pairs are kept whole, again in
chunks. A frame pair then also reads the selected rows of other pairs that represent its units. Merging and setting aside stay
inside a chunk (reductions.py).

The plan states how many rows every layer computes, so all shapes are known on a GPU too. The program synchronises with it
only at a selection between layers, at the end, when it reads all checks, and with reuse for patches that are on the GPU.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from evoprune.backend import devices
from evoprune.backend.attention import without_cudnn
from evoprune.methods.chain import select
from evoprune.methods.plans import EncoderPlan, SetAside, Stage, WholePairs
from evoprune.methods.ranking import closest
from evoprune.methods.types import Selection, Tokens, ascending
from evoprune.model.numerics import all_numbers, not_a_number_error, without_autocast
from evoprune.model.weights import Tower
from evoprune.vision.encoded import Checks, Encoded, EncodedRows, averaged, select_tokens
from evoprune.vision.families import embed, layers_of, merge_patches
from evoprune.vision.layout import TokenLayout, full_layout, selected_layout
from evoprune.vision.preprocess import CLIP, Chunk, Normal, in_chunks
from evoprune.vision.reductions import Followers, Gathering, Merging, Reduction
from evoprune.vision.segments import CarriedKeys, NothingNew, Rows, Segment
from evoprune.vision.tower import LayerRun, run_layers, tower_geometry, tower_shape


def encode(
    visual,
    patches: Iterable[torch.Tensor],
    plan: EncoderPlan,
    *,
    question: torch.Tensor | None = None,
    **how: Any,
) -> Encoded:
    """Encodes one video: `encode_rows`, whose other arguments (`how`) and errors it has, and `select_tokens`.

    `question`: `[Q, D]`, the embeddings of its tokens, for a method that reads the question.
    """
    return select_tokens(encode_rows(visual, patches, plan, **how), question)


@torch.inference_mode()
@without_cudnn()
def encode_rows(
    visual,
    patches: Iterable[torch.Tensor],
    plan: EncoderPlan,
    *,
    normal: Normal = CLIP,
    seed: int = 0,
    chunk_units: int | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    pause: Callable[[], None] = lambda: None,
    segment: Segment | None = None,
) -> EncodedRows:
    """The part of `encode` before a question is needed.

    Args:
        visual: the tower's weights: a `model.weights.Tower`, or transformers' tower of the same families, whose layers obey
            torch's autocast. The rows are then in its dtype.
        patches, normal: the whole video in pieces, as of `preprocess.in_chunks`.
        plan: for this tower, from `Pipeline.plan`.
        seed: as in `Tokens`.
        chunk_units: rows to encode at a time, rounded up to whole frame pairs; default: `devices.largest_chunk`.
        on_layer: called with the number of finished layers and of all, after each that follows a selection inside the tower.
        pause: called after every layer; it may wait.
        segment: of a longer video, if this is one; its `left` is for the next segment.

    Raises ValueError: the number of patches does not fit the grid. ModelError: the tower computes NaN or infinite values.
    NothingNew: no unit has changed since the segment before.
    """

    def after_layer(done: int) -> None:
        on_layer(done, plan.depth)
        pause()

    run = _Run(visual, plan, chunk_units, after_layer, lambda done: pause(), segment)
    with without_autocast() if isinstance(visual, Tower) else nullcontext():
        chunks = in_chunks(
            patches, run.geometry, plan.grid[0],
            normal=normal, rows=run.chunk_units, threshold=plan.reuse, dtype=run.dtype, timer=run.timer,
            even=run.checks.even if plan.prunes else None, references=run.segment and run.segment.references,
        )  # fmt: skip
        for chunk in chunks:
            run.collect(chunk, *run.run_first_layers(chunk))
        chunk = None  # frees the memory of the last chunk
        rows, selection = run.all_rows(), None
        for stage, layers in zip(plan.row_stages, plan.spans[1:], strict=True):
            rows, selection = run.select_rows(rows, stage, seed)
            rows = run.run_later_layers(rows, stage, layers)
        if plan.row_stages:
            rows.values = run.merge_patches(rows.values)
            run.note_numbers(rows.values, rows.deepstack)
    if run.segment:
        rows, selection = run.segment.joined(rows, selection)
    gathered = run.gathering.collected() if run.gathering else {}  # the inputs that the selector declared
    tokens = Tokens(rows.values, rows.unit_to_row, plan.grid, seed, gathered)
    source, layers = torch.cat(run.sources), list(enumerate(run.computed))
    return EncodedRows(plan, tokens, rows.unit, source, layers, selection, run.timer, run.checks, rows.deepstack)


class _Run:
    """The state of one video while the tower encodes it; its methods are the steps of `encode_rows`."""

    def __init__(
        self,
        visual,
        plan: EncoderPlan,
        chunk_units: int | None,
        after_layer: Callable[[int], None],
        pause: Callable[[int], None],
        segment: Segment | None = None,
    ):
        weight, tower = visual.patch_embed.proj.weight, tower_shape(visual)
        self.visual, self.plan = visual, plan
        self.device, self.dtype = weight.device, weight.dtype
        self.geometry = tower_geometry(visual, *plan.grid[1:])
        self.chunk_units = chunk_units or devices.largest_chunk(self.device)
        # Rows that go through an MLP or the patch merger at a time. In 16 bits a product rounds otherwise with another number of
        # rows, and a selection behind it would depend on the size of chunks.
        self.piece = devices.largest_chunk(self.device)
        self.after_layer, self.pause = after_layer, pause  # called with the number of finished layers
        self.timer, self.checks = devices.Timer(self.device), Checks()
        self.segment = segment and segment.begun(plan, self.geometry)  # None where the plan can leave nothing
        self.carried = CarriedKeys(self.segment and self.segment.earlier) if plan.reuse else None
        selector = plan.token_stage.selector if plan.token_stage else None
        needs = selector and selector.needs
        self.gathering = Gathering(selector, tower, lambda x: self.merge_patches(x.to(self.dtype))) if needs else None
        if self.gathering and not all(isinstance(stage.reduce, WholePairs) for stage in plan.row_stages):
            problem = "selects behind a selection between layers, and gets nothing but the rows"
            raise TypeError(f"method {selector.name} {problem}")
        self.computed = [0] * tower.depth
        self.pieces: list[Rows] = []
        self.sources: list[torch.Tensor] = []
        self.counts: tuple[int, ...] = ()  # rows that entered the tower, of each frame pair so far
        self.count = 0  # rows after the layers that run in chunks, so far

    def run_first_layers(self, chunk: Chunk) -> tuple[torch.Tensor, TokenLayout, torch.Tensor]:
        """The chunk's rows after the layers before the first selection, or behind the patch merger; layout; DeepStack features."""
        layout, end = chunk.layout, chunk.first + chunk.layout.pairs
        if self.carried:
            with self.timer:
                follows = end < self.plan.grid[0] or self.segment is not None  # no unit refers to the last chunk
                self.carried.begin(chunk.latest() if follows else None)
        x = embed(self.visual, chunk.patches, layout)
        reduction = _reduction(self.plan, range(chunk.first, end), self.checks.failed)
        run = LayerRun(
            self.visual, self.timer, self.computed, reduction, self.carried, self.gathering, on_layer=self.pause
        )
        x, layout = run_layers(run, self.plan.spans[0], x, layout)
        return x if self.plan.row_stages else self.merge_patches(x), layout, run.deepstack

    def collect(self, chunk: Chunk, x: torch.Tensor, layout: TokenLayout, deepstack: torch.Tensor) -> None:
        """Appends a chunk's rows, ordered by unit, to those of earlier chunks. `x`: after the patch merger if no layer follows."""
        unit, order = layout.unit.sort()
        if self.gathering:
            with self.timer:
                self.gathering.finish(order)
        index = order.argsort() + self.count  # of each row among all rows of the video
        unit_to_row = self.carried.among_all(layout.unit_to_row, index) if self.carried else index[layout.unit_to_row]
        x, deepstack = x[order], deepstack[order]
        self.note_numbers(x, deepstack)
        self.pieces.append(Rows(x, deepstack, unit + chunk.first * self.geometry.units, unit_to_row))
        source = chunk.source
        if source is None:
            source = (chunk.first + ascending(layout.pairs, order.device))[:, None].expand(-1, self.geometry.units)
        self.sources.append(source)
        self.counts += chunk.layout.counts
        self.count += len(order)

    def all_rows(self) -> Rows:
        """The rows of all chunks; frees the chunks. Raises NothingNew: there are none."""
        if not self.count:
            raise NothingNew
        rows = self.pieces[0]
        if len(self.pieces) > 1:
            live = [(each.values, each.deepstack) for each in self.pieces if len(each.values)]
            of_units = [(each.unit, each.unit_to_row) for each in self.pieces]
            rows = Rows(*map(torch.cat, (*zip(*live, strict=True), *zip(*of_units, strict=True))))
        if self.segment:
            self.segment.chunks_done(self.carried, rows.unit_to_row)
        self.pieces, self.carried = [], None
        return rows

    def select_rows(self, rows: Rows, stage: Stage, seed: int) -> tuple[Rows, Selection | None]:
        """The rows that go on; and the selection, if the language model reads exactly these rows.

        A selector that asks for no hidden states gets rows after the norm of the next layer, which reduces the few channels that
        are large in all rows. All rows of a video without any change go on if there are few enough of them.
        """
        plan, selector, whole_pairs = self.plan, stage.selector, isinstance(stage.reduce, WholePairs)
        most = plan.keep if whole_pairs else stage.rows
        if most >= len(rows.values) and not any(self.counts[1:]):
            return rows, None
        with self.timer:
            seen = rows.values
            if "hidden" not in selector.needs:
                seen = layers_of(self.visual).norm(self.visual.blocks[stage.first_layer].norm1, seen)
            seen = seen.flatten(1)
            tokens = Tokens(seen, rows.unit_to_row, plan.grid, seed)
            found = select(selector, tokens, min(most, len(rows.values)))
            unit_to_row = _nearest_kept(seen, rows.unit_to_row, found.kept) if found.owner is None else found.owner
            del seen, tokens  # as large as all rows
            means, deepstack = (averaged(found, values, rows.unit_to_row) for values in (rows.values, rows.deepstack))
        final = not whole_pairs and selector.suffices(len(found.kept), plan.keep, plan.units)
        return Rows(means, deepstack, found.kept, unit_to_row), found if final else None

    def run_later_layers(self, rows: Rows, stage: Stage, layers: range) -> Rows:
        """The selected rows after `layers`, which run on the whole video at once, or on chunks of whole frame pairs."""
        if isinstance(stage.reduce, WholePairs):
            at_once = -(-self.chunk_units // self.geometry.units) * self.geometry.units
            pieces = list(zip(rows.values.split(at_once), rows.deepstack.split(at_once), strict=True))
            made = [self._run_pairs(*piece, layers, last=piece is pieces[-1]) for piece in pieces]
            return Rows(*map(torch.cat, zip(*made, strict=True)), rows.unit, rows.unit_to_row)
        complete = not any(stage.selector.drops for stage in self.plan.row_stages)
        layout, order, back = selected_layout(self.geometry, self.plan.grid[0], rows.unit, rows.unit_to_row, complete)
        layout, carried = self.segment.enter(layout) if self.segment else (layout, None)
        how = {"carried": carried, "mlp_rows": self.piece, "deepstack": rows.deepstack[order]}
        run = LayerRun(self.visual, self.timer, self.computed, on_layer=self.after_layer, **how)
        x, rows.values = rows.values[order], None  # frees the rows in the old order
        x, _ = run_layers(run, layers, x, layout)
        if self.segment:
            self.segment.layers_done(carried, layers)
        return Rows(x[back], run.deepstack[back], rows.unit, rows.unit_to_row)

    def _run_pairs(
        self, x: torch.Tensor, deepstack: torch.Tensor, layers: range, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of whole frame pairs and their DeepStack features after `layers`, which are reported if these rows are the last."""
        layout = full_layout(self.geometry, len(x) // self.geometry.units)
        how = {"gathering": self.gathering, "deepstack": deepstack[layout.unit]}
        on_layer = self.after_layer if last else self.pause
        run = LayerRun(self.visual, self.timer, self.computed, on_layer=on_layer, **how)
        order = layout.unit.argsort()
        x, _ = run_layers(run, layers, x[layout.unit], layout)
        if self.gathering:
            with self.timer:
                self.gathering.finish(order)
        return x[order], run.deepstack[order]

    def merge_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `[E, D]` as the language model reads them, from rows `[E, 4, hidden]`; piece by piece, to bound the memory."""
        if not len(x):
            return x
        return torch.cat([merge_patches(self.visual, piece) for piece in x.split(self.piece)])

    def note_numbers(self, *rows: torch.Tensor) -> None:
        """Notes whether `rows` are without NaN and infinity; raises ModelError at once where reading values costs nothing."""
        for values in rows:
            if values.numel():
                self.checks.numbers.append(all_numbers(values))
                if devices.exact_shapes(self.device) and not self.checks.numbers[-1]:
                    raise not_a_number_error("encode")


def _nearest_kept(seen: torch.Tensor, unit_to_row: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """int64 `[N]`, for a selector that names no owners: which of `kept` (int64 `[K]`) is most similar to each unit, by cosine.

    `seen`: `[E, D]`, rows; `unit_to_row`: int64 `[N]`.
    """
    rows = F.normalize(seen.float(), dim=1)
    found = closest(rows, rows[unit_to_row[kept]])[1][unit_to_row]
    return torch.where(unit_to_row < 0, -1, found).index_copy_(0, kept, ascending(len(kept), kept.device))


def _reduction(plan: EncoderPlan, pairs: range, failed: list[torch.Tensor]) -> Reduction:
    """What the stages do with the rows of the chunk of these frame pairs. Raises TypeError where they cannot be together."""
    stages = plan.inside_chunks
    if not stages:
        return Reduction()
    if isinstance(stages[0].reduce, SetAside) and len(stages) == 1:
        return Followers(stages[0], plan.depth)
    mergers = {stage.reduce.merger for stage in stages if not isinstance(stage.reduce, SetAside)}
    if len(mergers) != 1:
        raise TypeError("the rows of a chunk are merged by one merger, or set aside once")
    left = {stage.first_layer: stage.reduce.left[pairs.start : pairs.stop] for stage in stages}
    return Merging(mergers.pop(), left, failed)
