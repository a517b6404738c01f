"""The pruned vision encoder: embed, run layers, select rows, run the other layers, merge patches, select tokens.

All rows of a video go through a layer before the first goes through the next. What is made on the way is bounded inside a layer,
which takes some rows through a product at a time, and some windows or frame pairs through attention (tower.py). The result does not
depend on how many, up to rounding. Without pruning the output is Hugging Face's.

The plan's stages say where rows are left behind. A selection covers the whole video; a frame pair then also reads the selected rows
of other pairs that represent its units. Merging and setting aside stay inside a frame pair (reductions.py). Last, `select_tokens`
selects among the rows after the tower what the language model reads.

The plan states how many rows every layer computes, so all shapes are known on a GPU too. The program synchronises with it
only at a selection between layers, at the end, when it reads all checks, and with reuse for patches that are on the GPU.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from evoprune.backend import devices
from evoprune.backend.attention import without_cudnn
from evoprune.errors import UsageError
from evoprune.methods.chain import select, tokens_before_inflection
from evoprune.methods.plans import EncoderPlan, Inflection, SetAside, Stage, WholePairs
from evoprune.methods.ranking import closest
from evoprune.methods.types import Selection, Tokens, arange_on, bincount_fixed, cat
from evoprune.model.config import vision_sizes
from evoprune.model.numerics import all_finite, not_a_number_error, without_autocast
from evoprune.model.weights import Tower
from evoprune.vision.families import embed, merge_patches, tower_layers
from evoprune.vision.layout import TokenLayout, full_layout, order_tables, referring_layout
from evoprune.vision.preprocess import CLIP, Normal, ReferenceBlocks, row_patches
from evoprune.vision.reductions import Followers, Gathering, Merging, Reduction
from evoprune.vision.rows import Rows
from evoprune.vision.tower import LayerRun, Visible, in_pieces, run_layers, tower_geometry, tower_shape


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


def encode_rows(visual, patches: Iterable[torch.Tensor], plan: EncoderPlan, **options: Any) -> EncodedRows:
    """Return the part of `encode` before a question is needed; `options`: of `EncoderRun`.

    Args:
        visual: the tower's weights: a `model.weights.Tower`, or transformers' tower of the same families, whose layers obey
            torch's autocast. The rows are then in its dtype.
        patches: the whole video in pieces, as of `preprocess.row_patches`.
        plan: for this tower, from `MethodChain.plan`.

    Raises ValueError: the number of patches does not fit the grid. ModelError: the tower computes NaN or infinite values.
    """
    return EncoderRun(visual, plan, **options).encode(patches)


class EncoderRun:
    """One video while the tower encodes it.

    Args:
        visual, plan: as of `encode_rows`.
        normal: as of `preprocess.row_patches`.
        seed: as in `Tokens`.
        piece_units: rows that go through a product at a time, and units that are embedded; default: `devices.largest_piece`. The
            memory depends on it. So does the result's rounding in 16 bits, where a product rounds otherwise with another number of
            rows.
        on_layer: called after each layer with the number of finished layers and of all.
        pause: called after each layer; it may wait.
    """

    visible: Visible | None = None  # as in `LayerRun`

    def __init__(
        self,
        visual,
        plan: EncoderPlan,
        *,
        normal: Normal = CLIP,
        seed: int = 0,
        piece_units: int | None = None,
        on_layer: Callable[[int, int], None] = lambda done, total: None,
        pause: Callable[[], None] = lambda: None,
    ):
        weight = visual.patch_embed.proj.weight
        tower = tower_shape(visual)
        self.visual = visual
        self.plan = plan
        self.normal = normal
        self.seed = seed
        self.device = weight.device
        self.dtype = weight.dtype
        self.geometry = tower_geometry(visual, *plan.grid[1:])
        self.piece = piece_units or devices.largest_piece(self.device)
        self.on_layer = on_layer
        self.pause = pause
        self.timer = devices.Timer(self.device)
        self.references: ReferenceBlocks | None = (
            None  # of reuse, of what comes before the frame pairs that are embedded next
        )
        # Results that `checks` puts together, bool tensors without dimension:
        self.one_colour: list[torch.Tensor] = []  # whether each frame pair of a piece has one colour
        self.failed: list[torch.Tensor] = []  # whether a group lost fewer rows than planned
        self.numbers: list[torch.Tensor] = []  # whether rows are without NaN and infinity
        selector = plan.token_stage.selector if plan.token_stage else None
        needs = selector and selector.needs
        self.gathering = Gathering(selector, tower, lambda x: self.merge_patches(x.to(self.dtype))) if needs else None
        if self.gathering and not all(isinstance(stage.reduce, WholePairs) for stage in plan.row_stages):
            problem = "selects behind a selection between layers, and gets nothing but the rows"
            raise TypeError(f"method {selector.name} {problem}")
        self.reduction = _reduction(plan, self.failed)
        self.computed = [0] * tower.depth
        self.source: torch.Tensor | None = None  # as in `EncodedRows`
        self.counts: tuple[int, ...] = ()  # rows that enter the tower, of each frame pair

    @torch.inference_mode()
    @without_cudnn()
    def encode(self, patches: Iterable[torch.Tensor]) -> EncodedRows:
        """Encodes the video. Arguments and errors as of `encode_rows`."""
        plan = self.plan
        selection = None
        with without_autocast() if isinstance(self.visual, Tower) else nullcontext():
            rows, layout = self.embed(patches)
            rows = self.run_layers(rows, layout, plan.spans[0], self.reduction)
            if plan.row_stages:
                self.note_numbers(rows.values, rows.deepstack)
            for stage, layers in zip(plan.row_stages, plan.spans[1:], strict=True):
                rows, selection = self.select_rows(rows, stage)
                rows = self.run_layers(rows, self.layout_of(rows, stage), layers, Reduction())
            rows.values = self.merge_patches(rows.values)
            self.note_numbers(rows.values, rows.deepstack)
            rows, order = rows.by_unit()
            gathered = {}  # the inputs that the selector declared
            if self.gathering:
                with self.timer:
                    gathered = self.gathering.collected(order)
        rows, selection = self.finish(rows, selection)
        tokens = Tokens(rows.values, rows.unit_to_row, plan.grid, self.seed, gathered)
        layers = list(enumerate(self.computed))
        return EncodedRows(plan, rows, tokens, self.source, layers, selection, self.timer, self.checks())

    def embed(self, patches: Iterable[torch.Tensor]) -> tuple[Rows, TokenLayout]:
        """Return the rows before the first layer, one for each unit that is not reused, and how they attend."""
        plan = self.plan
        geo = self.geometry
        values = []
        units = []
        sources = []
        pieces = row_patches(
            patches, geo, plan.grid[0],
            normal=self.normal, units=self.piece, threshold=plan.reuse, dtype=self.dtype, timer=self.timer,
            one_colour=self.one_colour if plan.prunes else None, references=self.references,
        )  # fmt: skip
        for piece in pieces:
            values.append(embed(self.visual, piece.patches, geo, piece.unit))
            units.append(piece.unit)
            sources.append(piece.source)
            self.counts += piece.counts
            self.references = piece.references
        self.source = cat(sources)
        layout = full_layout(geo, plan.grid[0])
        if plan.reuse:
            with self.timer:
                layout = referring_layout(geo, self.source, self.counts, cat(units))
        x = cat(values)
        deepstack = x.new_empty(len(x), 0, vision_sizes(self.visual.config).out_hidden_size)
        return Rows(x, deepstack, layout.unit, layout.unit_to_row), layout

    def layout_of(self, rows: Rows, stage: Stage) -> TokenLayout:
        """Return how rows attend that a stage has selected."""
        if isinstance(stage.reduce, WholePairs):
            return full_layout(self.geometry, len(rows.values) // self.geometry.units)
        complete = not any(stage.selector.drops for stage in self.plan.row_stages)
        return TokenLayout(self.geometry, self.plan.grid[0], rows.unit, rows.unit_to_row, "clip", complete=complete)

    def run_layers(self, rows: Rows, layout: TokenLayout, layers: range, reduction: Reduction) -> Rows:
        """Return the rows after `layers`, in which they attend as `layout` says."""
        run = LayerRun(
            self.visual, self.timer, self.computed, self.piece, reduction, self.visible, self.gathering,
            self.after_layer, rows.deepstack,
        )  # fmt: skip
        # which the first layer may free
        x = rows.values
        rows.values = None
        x, left = run_layers(run, layers, x, layout)
        if left is layout:
            return Rows(x, run.deepstack, rows.unit, rows.unit_to_row)
        return Rows(x, run.deepstack, left.unit, left.unit_to_row)

    def after_layer(self, done: int) -> None:
        """Called with the number of finished layers."""
        self.on_layer(done, self.plan.depth)
        self.pause()

    def select_rows(self, rows: Rows, stage: Stage) -> tuple[Rows, Selection | None]:
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
        (by_unit, _), rows.values = rows.by_unit(), None  # frees the rows in the old order
        with self.timer:
            seen = by_unit.values
            if "hidden" not in selector.needs:
                seen = tower_layers(self.visual).norm(self.visual.blocks[stage.first_layer].norm1, seen)
            seen = seen.flatten(1)
            tokens = Tokens(seen, by_unit.unit_to_row, plan.grid, self.seed)
            selection = select(selector, tokens, min(max_rows, len(seen)))
            unit_to_row = selection.unit_to_token
            if unit_to_row is None:
                unit_to_row = _nearest_kept(seen, by_unit.unit_to_row, selection.kept)
            del seen, tokens  # as large as all rows
            _, rank = order_tables(self.geometry, plan.grid[0])  # of each unit in window order
            kept_rows = by_unit.take(selection, unit_to_row, rank)
        final = not whole_pairs and selector.suffices(len(selection.kept), plan.keep, plan.units)
        return kept_rows, selection if final else None

    def merge_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `[E, D]` as the language model reads them, from rows `[E, 4, hidden]`."""
        return in_pieces(partial(merge_patches, self.visual), self.piece, x)

    def finish(self, rows: Rows, selection: Selection | None) -> tuple[Rows, Selection | None]:
        """Return the rows after the tower, ordered by unit, and the selection, as they leave the encoder."""
        return rows, selection

    def note_numbers(self, *rows: torch.Tensor) -> None:
        """Notes whether `rows` are without NaN and infinity; raises ModelError at once where reading values costs nothing."""
        for values in rows:
            if values.numel():
                self.numbers.append(all_finite(values))
                if devices.exact_shapes(self.device) and not self.numbers[-1]:
                    raise not_a_number_error("encode")

    def checks(self) -> torch.Tensor:
        """bool `[3]`, as in `EncodedRows`."""
        no_numbers = torch.stack(self.numbers).all().logical_not()
        no = torch.zeros_like(no_numbers)
        failed, one_colour = (torch.stack(noted) if noted else no for noted in (self.failed, self.one_colour))
        return torch.stack([no_numbers, failed.any(), one_colour.all()])


def _nearest_kept(seen: torch.Tensor, unit_to_row: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """int64 `[N]`, for a selector that says nothing of it: which of `kept` (int64 `[K]`) is most similar to each unit, by cosine.

    `seen`: `[E, D]`, rows; `unit_to_row`: int64 `[N]`.
    """
    rows = F.normalize(seen.float(), dim=1)
    nearest = closest(rows, rows[unit_to_row[kept]])[1][unit_to_row]
    return torch.where(unit_to_row < 0, -1, nearest).index_copy_(0, kept, arange_on(len(kept), kept.device))


def _reduction(plan: EncoderPlan, failed: list[torch.Tensor]) -> Reduction:
    """Return what the stages do with the rows of frame pairs. Raises TypeError where they cannot be together."""
    stages = plan.inside_pairs
    if not stages:
        return Reduction()
    if isinstance(stages[0].reduce, SetAside) and len(stages) == 1:
        return Followers(stages[0], plan.depth)
    mergers = {stage.reduce.merger for stage in stages if not isinstance(stage.reduce, SetAside)}
    if len(mergers) != 1:
        raise TypeError("the rows of a frame pair are merged by one merger, or set aside once")
    left = {stage.first_layer: stage.reduce.left for stage in stages}
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
        return Selection(unit[_largest(bincount_fixed(tokens.unit_to_row, len(unit)), keep)] if few else unit)
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
    order = arange_on(len(size), size.device)
    even = order * keep // len(size)  # a new value marks each row of an even selection
    first = torch.cat([torch.ones(1, dtype=torch.bool, device=size.device), even[1:] != even[:-1]])
    rank = (size * 2 + first).argsort(descending=True, stable=True)
    return rank[:keep].sort().values
