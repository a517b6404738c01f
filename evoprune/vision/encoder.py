"""The pruned vision encoder: embed, run layers, select rows, run the other layers, merge patches, select tokens.

The patches of a video arrive frame pair after frame pair and are encoded in chunks of whole frame pairs. Until a selection,
a layer reads nothing outside a frame pair but keys and values of reused rows, which are kept. So the layers' memory does not
grow with the video, and the result does not depend on the chunk size. Without pruning the output is Hugging Face's, up to rounding.

The plan's stages say where rows are left behind. A selection covers the whole video: one row of each unit that was encoded is
held until then, and the selected rows go through the following layers together, or, if frame pairs are kept whole, again in
chunks. A frame pair then also reads the selected rows of other pairs that represent its units. Merging and setting aside stay
inside a chunk (reductions.py). Last, `select_tokens` selects among the rows after the tower what the language model reads.

The plan states how many rows every layer computes, so all shapes are known on a GPU too. The program synchronises with it
only at a selection between layers, at the end, when it reads all checks, and with reuse for patches that are on the GPU.

A *segment* is a part of a longer video. A unit that has not changed since the segment before has no row of its own. The row that
its place had in the end represents it: attention sees that row's keys and values in every layer, and after the tower the row may
become a token, at its place here.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F

from evoprune.backend import devices
from evoprune.backend.attention import without_cudnn
from evoprune.errors import UsageError
from evoprune.methods.chain import select, tokens_before_inflection
from evoprune.methods.plans import EncoderPlan, Inflection, SetAside, Stage, WholePairs
from evoprune.methods.ranking import closest
from evoprune.methods.types import Selection, Tokens, ascending, cat, tally
from evoprune.model.numerics import all_numbers, not_a_number_error, without_autocast
from evoprune.model.weights import Tower
from evoprune.vision.families import embed, merge_patches, tower_layers
from evoprune.vision.layout import Geometry, TokenLayout, full_layout, order_tables
from evoprune.vision.preprocess import CLIP, Chunk, Normal, ReferenceBlocks, in_chunks
from evoprune.vision.reductions import Followers, Gathering, Merging, Reduction
from evoprune.vision.tower import CarriedKeys, LayerRun, in_pieces, run_layers, tower_geometry, tower_shape


@dataclass(frozen=True, repr=False)
class Encoded:
    """One encoded video, or several in a row, as the language model reads them."""

    features: torch.Tensor  # `[K, D]`, the tokens
    kept: torch.Tensor  # int64 `[K]`, the unit whose position each token has, ascending in Hugging Face's order
    rows: torch.Tensor  # `[E, D]`, the encoder's rows, ordered by unit
    unit_to_row: torch.Tensor  # int64 `[N]`, the index in `rows` of the row that represents each unit, -1 for none
    grids: tuple[tuple[int, int, int], ...]  # (T, H, W) in units, of each video
    layers: list[tuple[int, int]]  # (layer, rows that it computes), summed over the videos
    prune_seconds: float  # spent on scores, merging and selection; part of the encoding time
    flat: bool = False  # whether every frame pair has one colour, so that no unit differs from another
    # float32 `[K]`, the weight of each token in the language model's attention, which adds log(size) to its logits: in `evoprune`
    # (cluster size) ** count, that is the square root by default. None for 1 each.
    size: torch.Tensor | None = None
    # `[n, K, D]`, added to the tokens after the first n layers of the language model
    deepstack: torch.Tensor | None = None
    read: torch.Tensor | None = None  # `kept` on the CPU, if it has been read
    after_tower_below: int = 0  # as in `EncoderPlan`; of several videos the largest

    def __repr__(self) -> str:
        tokens, width = self.features.shape
        return f"<Encoded: {tokens:,} of {len(self.unit_to_row):,} visual tokens, {width} numbers each, grids {list(self.grids)}>"

    @property
    def live_share(self) -> float:
        """The live share: the mean over the layers of rows computed / units. The tower's time is proportional to it."""
        return sum(rows for _, rows in self.layers) / len(self.layers) / len(self.unit_to_row)

    @cached_property
    def kept_here(self) -> torch.Tensor:
        """`kept` on the CPU, read once: from an accelerator it waits."""
        return self.kept.cpu() if self.read is None else self.read

    @property
    def every_feature(self) -> torch.Tensor:
        """`[(1 + n) K, D]`: the tokens, and behind them what DeepStack adds to them."""
        return torch.cat([self.features, *(() if self.deepstack is None else self.deepstack)])

    @property
    def kept_per_pair(self) -> list[int]:
        """Number of tokens in each frame pair, video after video."""
        kept = self.kept_here.tolist()
        ends = accumulate(h * w for t, h, w in self.grids for _ in range(t))
        return [after - before for before, after in pairwise([0, *(bisect_left(kept, end) for end in ends)])]


def joined(videos: list[Encoded]) -> Encoded:
    """Several videos as one; the numbers of units and rows continue from video to video."""
    if len(videos) == 1:
        return videos[0]
    units = [0, *accumulate(len(v.unit_to_row) for v in videos)]
    rows = [0, *accumulate(len(v.rows) for v in videos)]
    sizes = None
    if any(v.size is not None for v in videos):
        ones = (v.features.new_ones(len(v.kept), dtype=torch.float32) for v in videos)
        sizes = torch.cat([one if v.size is None else v.size for v, one in zip(videos, ones, strict=True)])
    return Encoded(
        torch.cat([v.features for v in videos]),
        torch.cat([v.kept + first for v, first in zip(videos, units, strict=False)]),
        torch.cat([v.rows for v in videos]),
        torch.cat(
            [torch.where(v.unit_to_row >= 0, v.unit_to_row + first, -1) for v, first in zip(videos, rows, strict=False)]
        ),
        sum((v.grids for v in videos), ()),
        [(layers[0][0], sum(n for _, n in layers)) for layers in zip(*(v.layers for v in videos), strict=True)],
        sum(v.prune_seconds for v in videos),
        all(v.flat for v in videos),
        sizes,
        None if videos[0].deepstack is None else torch.cat([v.deepstack for v in videos], 1),
        after_tower_below=max(v.after_tower_below for v in videos),
    )


@dataclass
class Rows:
    """Rows of a video, in window order from the embedding to the last layer, ordered by unit where a selector reads them."""

    values: torch.Tensor  # `[E, 4, hidden]`, or `[E, D]` after the patch merger
    deepstack: torch.Tensor  # `[E, n, D]`, the features of inner layers so far; averaged where the rows are
    unit: torch.Tensor  # int64 `[E]`, the unit whose place each row has
    unit_to_row: torch.Tensor  # int64 `[N]`, the row that represents each unit, -1 for none

    def sorted_by(self, rank: torch.Tensor | None = None) -> tuple["Rows", torch.Tensor]:
        """Return the rows in ascending order of `rank` (int64 `[E]`; default: their units); and the index here of each, int64
        `[E]`.
        """
        unit, order = self.unit.sort() if rank is None else (None, rank.argsort())
        unit_to_row = F.pad(order.argsort(), (0, 1), value=-1)[self.unit_to_row]  # -1 is the last entry
        deepstack = self.deepstack[order] if self.deepstack.numel() else self.deepstack
        return Rows(self.values[order], deepstack, self.unit[order] if unit is None else unit, unit_to_row), order

    def averaged(self, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
        """`[K, ...]`: values and DeepStack features of the selected units, from rows that are ordered by unit."""
        means = []
        for x in (self.values, self.deepstack):
            shape = len(selection.kept), *x.shape[1:]
            means.append(
                selection.features(x.flatten(1), self.unit_to_row).view(shape) if x.numel() else x.new_empty(shape)
            )
        return tuple(means)


@dataclass(frozen=True)
class EncodedRows:
    """A video after the tower, before tokens are selected."""

    plan: EncoderPlan
    rows: Rows  # ordered by unit
    tokens: Tokens  # the same as the input of the selector
    source: torch.Tensor  # int64 `[T, H*W]`, the number of the frame pair whose pixels represent each unit
    layers: list[tuple[int, int]]  # as in `Encoded`
    selection: Selection | None  # inside the tower, if the language model reads exactly those rows
    timer: devices.Timer  # of pruning
    # bool `[3]`, read at the end, so that nothing synchronises earlier: whether a row has NaN or infinite values, whether a merger
    # did not remove its rows, and whether every frame pair has one colour
    checks: torch.Tensor

    def nothing_selected(self) -> Encoded:
        """Return an encoding without tokens, for a method whose question is not known yet."""
        rows = self.rows
        return self.encoded(rows.values[:0], rows.unit[:0], None, rows.deepstack[:0])

    def encoded(
        self, features: torch.Tensor, kept: torch.Tensor, size: torch.Tensor | None, deepstack: torch.Tensor
    ) -> Encoded:
        """Return the encoding with these tokens; `deepstack`: `[K, n, D]`. Errors as of `finish`."""
        flat, seconds, read = self.finish(kept)
        by_layer = deepstack.transpose(0, 1) if deepstack.shape[1] else None
        about = self.rows.values, self.rows.unit_to_row, (self.plan.grid,), self.layers, seconds, flat
        return Encoded(features, kept, *about, size, by_layer, read, self.plan.after_tower_below)

    def finish(self, kept: torch.Tensor) -> tuple[bool, float, torch.Tensor]:
        """Return whether each frame pair has one colour, the seconds spent on pruning, and `kept` on the CPU; reads all checks.

        Raises ModelError: a row has NaN or infinite values. RuntimeError: a merger did not remove its rows.
        """
        checks = self.checks
        if not devices.exact_shapes(kept.device):  # one copy from an accelerator
            checks, kept = torch.cat([checks.long(), kept]).cpu().split([len(checks), len(kept)])
        no_numbers, failed, flat = map(bool, checks.tolist())
        if no_numbers:
            raise not_a_number_error("encode")
        if failed:
            name = self.plan.stages[0].reduce.merger.name
            raise RuntimeError(f"method {name} did not remove as many rows as it was asked to")
        return flat, self.timer.seconds(), kept


def encode(
    visual, patches: Iterable[torch.Tensor], plan: EncoderPlan, *, question: torch.Tensor | None = None, **kwargs: Any
) -> Encoded:
    """Encodes one video: `encode_rows`, whose other arguments (`kwargs`) and errors it has, and `select_tokens`.

    `question`: `[Q, D]`, the embeddings of its tokens, for a method that reads the question.
    """
    return select_tokens(encode_rows(visual, patches, plan, **kwargs), question)


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
    segment: "Segment | None" = None,
) -> EncodedRows:
    """Return the part of `encode` before a question is needed.

    Args:
        visual: the tower's weights: a `model.weights.Tower`, or transformers' tower of the same families, whose layers obey
            torch's autocast. The rows are then in its dtype.
        patches, normal: the whole video in pieces, as of `preprocess.in_chunks`.
        plan: for this tower, from `MethodChain.plan`.
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
            even=run.even if plan.prunes else None, references=run.earlier and run.earlier.references,
        )  # fmt: skip
        for chunk in chunks:
            run.collect(chunk)
        chunk = None  # frees the memory of the last chunk
        rows = run.all_rows()
        selection = None
        for stage, layers in zip(plan.row_stages, plan.spans[1:], strict=True):
            rows, selection = run.select_rows(rows, stage, seed)
            rows = run.run_later_layers(rows, stage, layers)
        rows, order = rows.sorted_by()
        gathered = run.gathering.collected(order) if run.gathering else {}  # the inputs that the selector declared
        if plan.row_stages:
            rows.values = run.merge_patches(rows.values)
            run.note_numbers(rows.values, rows.deepstack)
    if run.segment:
        rows, selection = run.segment.finish(rows, selection, run.carried, run.references)
    tokens = Tokens(rows.values, rows.unit_to_row, plan.grid, seed, gathered)
    source = cat(run.sources)
    layers = list(enumerate(run.computed))
    return EncodedRows(plan, rows, tokens, source, layers, selection, run.timer, run.checks())


class _Run:
    """The state of one video while the tower encodes it; its methods are the steps of `encode_rows`."""

    def __init__(
        self,
        visual,
        plan: EncoderPlan,
        chunk_units: int | None,
        after_layer: Callable[[int], None],
        pause: Callable[[int], None],
        segment: "Segment | None" = None,
    ):
        weight = visual.patch_embed.proj.weight
        tower = tower_shape(visual)
        self.visual = visual
        self.plan = plan
        self.device = weight.device
        self.dtype = weight.dtype
        self.geometry = tower_geometry(visual, *plan.grid[1:])
        self.chunk_units = chunk_units or devices.largest_chunk(self.device)
        # Rows that go through an MLP or the patch merger at a time. In 16 bits a product rounds otherwise with another number of
        # rows, and a selection behind it would depend on the size of chunks.
        self.piece = devices.largest_chunk(self.device)
        # called with the number of finished layers
        self.after_layer = after_layer
        self.pause = pause
        self.timer = devices.Timer(self.device)
        # Results that `checks` puts together, bool tensors without dimension:
        self.even: list[torch.Tensor] = []  # for each chunk, whether each frame pair has one colour
        self.failed: list[torch.Tensor] = []  # whether a group lost fewer rows than planned
        self.numbers: list[torch.Tensor] = []  # whether rows are without NaN and infinity
        self.segment = segment and segment.begun(plan, self.geometry)  # None where the plan can leave nothing
        self.earlier = self.segment and self.segment.earlier
        self.carried = CarriedKeys(self.earlier and self.earlier.keys_values) if plan.reuse else None
        selector = plan.token_stage.selector if plan.token_stage else None
        needs = selector and selector.needs
        self.gathering = Gathering(selector, tower, lambda x: self.merge_patches(x.to(self.dtype))) if needs else None
        if self.gathering and not all(isinstance(stage.reduce, WholePairs) for stage in plan.row_stages):
            problem = "selects behind a selection between layers, and gets nothing but the rows"
            raise TypeError(f"method {selector.name} {problem}")
        self.computed = [0] * tower.depth
        self.pieces: list[Rows] = []
        self.sources: list[torch.Tensor] = []
        self.references: ReferenceBlocks | None = None  # behind the chunks so far
        self.counts: tuple[int, ...] = ()  # rows that entered the tower, of each frame pair so far
        self.count = 0  # rows after the layers that run in chunks, so far

    def run_layers(
        self, layers: range, x: torch.Tensor, layout: TokenLayout, **kwargs: Any
    ) -> tuple[torch.Tensor, TokenLayout, torch.Tensor]:
        """As `tower.run_layers`, and the DeepStack features `[R, n, D]` of these rows; `kwargs`: fields of `LayerRun`."""
        run = LayerRun(self.visual, self.timer, self.computed, gathering=self.gathering, **kwargs)
        x, layout = run_layers(run, layers, x, layout)
        return x, layout, run.deepstack

    def collect(self, chunk: Chunk) -> None:
        """Adds a chunk's rows after the layers before the first selection, or behind the patch merger."""
        layout, end = chunk.layout, chunk.first + chunk.layout.pairs
        if self.carried:
            self.carried.begin(end < self.plan.grid[0] or self.segment is not None)
        x = embed(self.visual, chunk.patches, layout)
        reduction = _reduction(self.plan, range(chunk.first, end), self.failed)
        args = {"reduction": reduction, "carried": self.carried, "on_layer": self.pause}
        x, layout, deepstack = self.run_layers(self.plan.spans[0], x, layout, **args)
        x = x if self.plan.row_stages else self.merge_patches(x)
        unit_to_row = self.carried.among_all(layout, self.count) if self.carried else layout.unit_to_row + self.count
        self.note_numbers(x, deepstack)
        self.pieces.append(Rows(x, deepstack, layout.unit + chunk.first * self.geometry.units, unit_to_row))
        source = chunk.source
        if source is None:
            source = (chunk.first + ascending(layout.pairs, unit_to_row.device))[:, None].expand(
                -1, self.geometry.units
            )
        self.sources.append(source)
        self.counts += chunk.layout.counts
        self.count += layout.rows
        if self.gathering:
            with self.timer:
                self.gathering.finish()
        self.references = chunk.references

    def all_rows(self) -> Rows:
        """Return the rows of all chunks; frees the chunks. Raises NothingNew: there are none."""
        if not self.count:
            raise NothingNew
        live = [(piece.values, piece.deepstack) for piece in self.pieces if len(piece.values)]
        of_units = [(piece.unit, piece.unit_to_row) for piece in self.pieces]
        rows = Rows(*map(cat, (*zip(*live, strict=True), *zip(*of_units, strict=True))))
        if self.segment:
            self.segment.chunks_done(rows.unit_to_row)
        self.pieces, self.carried = [], self.carried if self.segment else None
        return rows

    def select_rows(self, rows: Rows, stage: Stage, seed: int) -> tuple[Rows, Selection | None]:
        """Return the rows that go on; and the selection, if the language model reads exactly these rows.

        A selector that asks for no hidden states gets rows after the norm of the next layer, which reduces the few channels that
        are large in all rows. All rows of a video without any change go on if there are few enough of them.
        """
        plan = self.plan
        selector = stage.selector
        whole_pairs = isinstance(stage.reduce, WholePairs)
        max_rows = plan.keep if whole_pairs else stage.rows
        if max_rows >= len(rows.values) and not any(self.counts[1:]):
            return rows, None
        (by_unit, _), rows.values = rows.sorted_by(), None  # frees the rows in the old order
        with self.timer:
            seen = by_unit.values
            if "hidden" not in selector.needs:
                seen = tower_layers(self.visual).norm(self.visual.blocks[stage.first_layer].norm1, seen)
            seen = seen.flatten(1)
            tokens = Tokens(seen, by_unit.unit_to_row, plan.grid, seed)
            selection = select(selector, tokens, min(max_rows, len(seen)))
            unit_to_row = selection.unit_to_token
            if unit_to_row is None:
                unit_to_row = _nearest_kept(seen, by_unit.unit_to_row, selection.kept)
            del seen, tokens  # as large as all rows
            means, deepstack = by_unit.averaged(selection)
        rank = order_tables(self.geometry, plan.grid[0])[1]  # of each unit in window order
        kept_rows, _ = Rows(means, deepstack, selection.kept, unit_to_row).sorted_by(rank[selection.kept])
        final = not whole_pairs and selector.suffices(len(selection.kept), plan.keep, plan.units)
        return kept_rows, selection if final else None

    def run_later_layers(self, rows: Rows, stage: Stage, layers: range) -> Rows:
        """Return the selected rows after `layers`, which run on the whole video at once, or on chunks of whole frame pairs."""
        if isinstance(stage.reduce, WholePairs):
            at_once = -(-self.chunk_units // self.geometry.units) * self.geometry.units
            pieces = list(zip(rows.values.split(at_once), rows.deepstack.split(at_once), strict=True))
            outputs = [self._run_pairs(*piece, layers, last=piece is pieces[-1]) for piece in pieces]
            return Rows(*map(torch.cat, zip(*outputs, strict=True)), rows.unit, rows.unit_to_row)
        complete = not any(stage.selector.drops for stage in self.plan.row_stages)
        layout = TokenLayout(self.geometry, self.plan.grid[0], rows.unit, rows.unit_to_row, "clip", complete=complete)
        layout = self.segment.enter(layout) if self.segment else layout
        args = {"carried": self.carried, "piece": self.piece, "on_layer": self.after_layer, "deepstack": rows.deepstack}
        # which the first layer may free
        x = rows.values
        rows.values = None
        x, _, deepstack = self.run_layers(layers, x, layout, **args)
        return Rows(x, deepstack, rows.unit, rows.unit_to_row)

    def _run_pairs(
        self, x: torch.Tensor, deepstack: torch.Tensor, layers: range, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of whole frame pairs and their DeepStack features after `layers`, which are reported if these rows are the last."""
        layout = full_layout(self.geometry, len(x) // self.geometry.units)
        args = {"on_layer": self.after_layer if last else self.pause, "deepstack": deepstack}
        x, _, deepstack = self.run_layers(layers, x, layout, **args)
        if self.gathering:
            with self.timer:
                self.gathering.finish()
        return x, deepstack

    def merge_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `[E, D]` as the language model reads them, from rows `[E, 4, hidden]`; piece by piece, to bound the memory."""
        return in_pieces(partial(merge_patches, self.visual), x, self.piece) if len(x) else x

    def note_numbers(self, *rows: torch.Tensor) -> None:
        """Notes whether `rows` are without NaN and infinity; raises ModelError at once where reading values costs nothing."""
        for values in rows:
            if values.numel():
                self.numbers.append(all_numbers(values))
                if devices.exact_shapes(self.device) and not self.numbers[-1]:
                    raise not_a_number_error("encode")

    def checks(self) -> torch.Tensor:
        """bool `[3]`, as in `EncodedRows`."""
        no_numbers = torch.stack(self.numbers).all().logical_not()
        no = torch.zeros_like(no_numbers)
        failed, even = (torch.stack(noted) if noted else no for noted in (self.failed, self.even))
        return torch.stack([no_numbers, failed.any(), even.all()])


def _nearest_kept(seen: torch.Tensor, unit_to_row: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """int64 `[N]`, for a selector that says nothing of it: which of `kept` (int64 `[K]`) is most similar to each unit, by cosine.

    `seen`: `[E, D]`, rows; `unit_to_row`: int64 `[N]`.
    """
    rows = F.normalize(seen.float(), dim=1)
    nearest = closest(rows, rows[unit_to_row[kept]])[1][unit_to_row]
    return torch.where(unit_to_row < 0, -1, nearest).index_copy_(0, kept, ascending(len(kept), kept.device))


def _reduction(plan: EncoderPlan, pairs: range, failed: list[torch.Tensor]) -> Reduction:
    """Return what the stages do with the rows of the chunk of these frame pairs. Raises TypeError where they cannot be together."""
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


@torch.inference_mode()
def select_tokens(video: EncodedRows, question: torch.Tensor | None = None) -> Encoded:
    """Selects the tokens that the language model reads. May be called again with another question.

    `question`: as in `encode`; ignored unless the method reads the question.

    Raises ModelError, RuntimeError: as in `EncodedRows.finish`. UsageError, PluginError: as in `selected`.
    """
    rows = video.rows
    with video.timer:
        selection = selected(video, question)
        kept = devices.to_device(selection.kept, rows.unit.device)
        features = rows.values
        deepstack = rows.deepstack
        if selection is not video.selection:
            features, deepstack = rows.averaged(replace(selection, kept=kept))
    return video.encoded(features, kept, selection.size, deepstack)


def selected(video: EncodedRows, question: torch.Tensor | None = None) -> Selection:
    """Return the units that the language model reads; arguments as in `select_tokens`.

    Raises UsageError: the method reads the question, and there is none. PluginError: as `methods.chain.select`.
    """
    tokens = video.tokens
    unit = video.rows.unit
    keep = video.plan.keep
    stage = video.plan.token_stage
    if video.selection is not None or not video.plan.prunes:
        return video.selection or Selection(unit)
    if stage is None:
        few = len(unit) > keep
        return Selection(unit[_largest(tally(tokens.unit_to_row, len(unit)), keep)] if few else unit)
    selector = stage.selector
    if selector.reads_question:
        if question is None:
            problem = f"method {selector.name} reads the question, and there is none here"
            raise UsageError(problem, "give the question with the video, or take another method")
        tokens = replace(tokens, given={**tokens.given, "question": question.to(unit.device).float()})
    if isinstance(stage.reduce, Inflection):
        keep = tokens_before_inflection(selector, tokens, keep)
    return select(selector, tokens, keep)


def _largest(size: torch.Tensor, keep: int) -> torch.Tensor:
    """int64 `[keep]`, ascending: the rows of largest cluster `size` (int64 `[E]`); among equal ones, at even distances.

    This serves counts below one row per frame pair, which merging inside frame pairs cannot reach.
    """
    order = ascending(len(size), size.device)
    even = order * keep // len(size)  # a new value marks each row of an even selection
    first = torch.cat([torch.ones(1, dtype=torch.bool, device=size.device), even[1:] != even[:-1]])
    rank = (size * 2 + first).argsort(descending=True, stable=True)
    return rank[:keep].sort().values


# Segments of a longer video.


class NothingNew(Exception):
    """A segment of a longer video has no row of its own."""


@dataclass(frozen=True)
class Earlier:
    """What a segment of a longer video leaves to the next one, for each of P places: of the row that represents its last unit."""

    references: ReferenceBlocks  # its pixels
    keys_values: dict[int, torch.Tensor]  # by layer: `[P, 2, 4, heads, d]`
    features: torch.Tensor  # `[P, D]`, after the patch merger
    deepstack: torch.Tensor  # `[P, n, D]`


class Segment:
    """One segment: what it takes over from the one before (`earlier`), and what it leaves to the next one (`left`).

    `left` is None until it has been encoded, and where the plan reuses nothing or its stages and selector need more than rows.
    """

    def __init__(self, earlier: Earlier | None = None):
        self.earlier = earlier
        self.left = None

    def begun(self, plan: EncoderPlan, geo: Geometry) -> Self | None:
        """Itself, before its first chunk; None where it can leave nothing."""
        stage, whole = plan.token_stage, any(isinstance(stage.reduce, WholePairs) for stage in plan.row_stages)
        if not plan.reuse or plan.inside_chunks or whole or (stage and stage.selector and stage.selector.needs):
            return None
        self._units, self._places, self.left = plan.units, geo.units, None
        self._outside: torch.Tensor | None = None  # bool `[N]`: units that have rows of the segment before
        return self

    def chunks_done(self, unit_to_row: torch.Tensor) -> None:
        """Called after the layers that run in chunks; `unit_to_row`: int64 `[N]`, -1 for units with rows of the segment before."""
        self._outside = unit_to_row < 0 if self.earlier else None

    def enter(self, layout: TokenLayout) -> TokenLayout:
        """Return the layout of all rows, in which units also have rows of the segment before, whose keys are those that are
        carried.
        """
        if self._outside is None:
            return layout
        outside = layout.rows + ascending(self._units, layout.unit_to_row.device) % self._places
        return replace(layout, unit_to_row=torch.where(self._outside, outside, layout.unit_to_row))

    def finish(
        self, rows: Rows, selection: Selection | None, carried: CarriedKeys, references: ReferenceBlocks
    ) -> tuple[Rows, Selection | None]:
        """Return the rows after the tower, with those of the segment before that represent units here, each at the first of them.

        `selection`: of the tokens, among the rows that were computed; returned where there are no others. `references`: behind the
        last chunk.
        """
        if self.earlier:
            rows = self._with_earlier(rows, self._outside.view(-1, self._places))
            selection = None
        last = rows.unit_to_row[-self._places :]
        references = replace(references, pair=torch.full_like(references.pair, -1), seen=0)
        self.left = Earlier(references, carried.keys_values, rows.values[last], rows.deepstack[last])
        return rows, selection

    def _with_earlier(self, rows: Rows, outside: torch.Tensor) -> Rows:
        place = outside.any(0).nonzero()[:, 0]
        rank = torch.zeros_like(outside[0], dtype=torch.int64)
        rank[place] = len(rows.unit) + ascending(len(place), rank.device)
        unit = torch.cat([rows.unit, outside.to(torch.uint8).argmax(0)[place] * self._places + place])
        unit_to_row = torch.where(outside, rank, rows.unit_to_row.view_as(outside)).flatten()
        values = torch.cat([rows.values, self.earlier.features[place]])
        deepstack = torch.cat([rows.deepstack, self.earlier.deepstack[place]])
        return Rows(values, deepstack, unit, unit_to_row).sorted_by()[0]
