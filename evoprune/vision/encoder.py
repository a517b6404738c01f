"""The pruned vision encoder: embed, run layers, select rows, run the other layers, merge patches, select tokens.

All rows of a video go through a layer before the first goes through the next. What is made on the way is bounded inside a layer,
which takes some rows through a product at a time, and some windows or frame pairs through attention (tower.py). The result does not
depend on how many, up to rounding. Without pruning the output is Hugging Face's.

The plan's steps are some layers, and a selection among the rows of the whole video. A frame pair then also reads the selected rows
of other pairs that represent its units. Merging and setting aside stay inside a frame pair: they are hooks after a layer
(hooks.py). Last, `select_tokens` selects among the rows after the tower what the language model reads.

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

from evoprune.backend import devices, without_cudnn
from evoprune.errors import UsageError
from evoprune.methods import (
    EncoderPlan,
    Merge,
    Selection,
    SetAside,
    Stage,
    Tokens,
    TowerShape,
    arange_on,
    closest,
    select,
    tokens_before_inflection,
)
from evoprune.model import PATCHES, Tower, all_finite, not_a_number_error, vision_sizes, without_autocast
from evoprune.vision.families import embed, merge_patches, tower_layers
from evoprune.vision.hooks import Hook, looks
from evoprune.vision.layout import bincount_fixed, window_order
from evoprune.vision.merging import Merging
from evoprune.vision.patches import CLIP, Normal, ReferenceBlocks, in_pairs, normalised, patch_means, scan
from evoprune.vision.rows import Rows, all_units, reused_units
from evoprune.vision.tower import (
    Layer,
    Visible,
    in_pieces,
    rotation_of,
    run_by_kernels,
    run_layer,
    tower_geometry,
    tower_shape,
)


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
    kept_on_cpu: torch.Tensor | None = None  # `kept`, if it has been read
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
        return self.kept.cpu() if self.kept_on_cpu is None else self.kept_on_cpu

    @property
    def every_size(self) -> torch.Tensor:
        """float32 `[K]`: `size`, with ones for None."""
        if self.size is None:
            return self.features.new_ones(len(self.kept), dtype=torch.float32)
        return self.size

    @property
    def every_feature(self) -> torch.Tensor:
        """`[(1 + n) K, D]`: the tokens, and behind them what DeepStack adds to them."""
        if self.deepstack is None:
            return self.features
        return torch.cat([self.features, *self.deepstack])

    @property
    def kept_per_pair(self) -> list[int]:
        """Number of tokens in each frame pair, video after video."""
        kept = self.kept_here.tolist()
        ends = accumulate(h * w for t, h, w in self.grids for _ in range(t))
        return [after - before for before, after in pairwise([0, *(bisect_left(kept, end) for end in ends)])]


def joined(videos: list[Encoded]) -> Encoded:
    """Return several videos as one; the numbers of units and rows continue from video to video."""
    if len(videos) == 1:
        return videos[0]
    units = [0, *accumulate(len(v.unit_to_row) for v in videos)]
    rows = [0, *accumulate(len(v.rows) for v in videos)]
    sizes = None
    if any(v.size is not None for v in videos):
        sizes = torch.cat([v.every_size for v in videos])
    deepstack = None
    if videos[0].deepstack is not None:
        deepstack = torch.cat([v.deepstack for v in videos], 1)
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
        deepstack,
        after_tower_below=max(v.after_tower_below for v in videos),
    )


@dataclass(frozen=True)
class EncodedRows:
    """A video after the tower, before tokens are selected."""

    plan: EncoderPlan
    rows: Rows  # ordered by unit
    seed: int  # as in `Tokens`
    source: torch.Tensor  # int64 `[T, H*W]`, the number of the frame pair whose pixels represent each unit
    layers: list[tuple[int, int]]  # as in `Encoded`
    selection: Selection | None  # inside the tower, if the language model reads exactly those rows
    timer: devices.Timer  # of pruning
    # bool `[3]`, read at the end, so that nothing synchronises earlier: whether all rows are without NaN and infinity, whether
    # mergers have removed their rows, and whether every frame pair has one colour
    checks: torch.Tensor

    @cached_property
    def selector_input(self) -> Tokens:
        """The rows as the selector of tokens gets them."""
        return Tokens(self.rows.values, self.rows.unit_to_row, self.plan.grid, self.seed, self.rows.given)

    def nothing_selected(self) -> Encoded:
        """Return an encoding without tokens, for a method whose question is not known yet."""
        rows = self.rows
        return self.encoded(rows.values[:0], rows.unit[:0], None, rows.deepstack[:0])

    def encoded(
        self, features: torch.Tensor, kept: torch.Tensor, size: torch.Tensor | None, deepstack: torch.Tensor
    ) -> Encoded:
        """Return the encoding with these tokens; `deepstack`: `[K, n, D]`. Errors as of `read_checks`."""
        flat, seconds, kept_on_cpu = self.read_checks(kept)
        by_layer = None
        if deepstack.shape[1]:
            by_layer = deepstack.transpose(0, 1)
        about = self.rows.values, self.rows.unit_to_row, (self.plan.grid,), self.layers, seconds, flat
        return Encoded(features, kept, *about, size, by_layer, kept_on_cpu, self.plan.after_tower_below)

    def read_checks(self, kept: torch.Tensor) -> tuple[bool, float, torch.Tensor]:
        """Return whether each frame pair has one colour, the seconds spent on pruning, and `kept` on the CPU; reads all checks.

        Raises ModelError: a row has NaN or infinite values. RuntimeError: a merger did not remove its rows.
        """
        checks, kept = devices.read_together(self.checks, kept)
        numbers, as_planned, flat = map(bool, checks.tolist())
        if not numbers:
            raise not_a_number_error("encode")
        if not as_planned:
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
        patches: the whole video in pieces `[n, values]`: pixels (uint8), or already normalised, as by a processor.
        plan: for this tower, from `MethodChain.plan`.

    Raises ValueError: the number of patches does not fit the grid. ModelError: the tower computes NaN or infinite values.
    """
    return EncoderRun(visual, plan, **options).encode(patches)


class EncoderRun:
    """One video while the tower encodes it.

    Args:
        visual, plan: as of `encode_rows`.
        normal: mean and standard deviation of the colours, by which pixels are normalised.
        seed: as in `Tokens`.
        piece_units: rows that go through a product at a time, and units that are embedded; default: `devices.largest_piece`. The
            memory depends on it. So does the result's rounding in 16 bits, where a product rounds otherwise with another number of
            rows.
        on_layer: called after each layer with the number of finished layers and of all.
        pause: called after each layer; it may wait.
    """

    visible: Visible | None = None  # as of `run_layer`

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
        # Of reuse, of what comes before the frame pairs that are embedded next
        self.references: ReferenceBlocks | None = None
        # Results that `checks` puts together, bool tensors without dimension:
        self.one_colour: list[torch.Tensor] = []  # whether each frame pair of a piece has one colour
        self.finite: list[torch.Tensor] = []  # whether rows are without NaN and infinity
        self.as_planned: list[torch.Tensor] = []  # each time that rows merge, whether as many are left as planned
        tower = tower_shape(visual)
        self.hooks = _hooks(plan, tower, lambda x: self.merge_patches(x.to(self.dtype)), self.as_planned)
        self.computed = [0] * tower.depth  # rows of each layer
        self.source: torch.Tensor | None = None  # as in `EncodedRows`
        self.counts: tuple[int, ...] = ()  # rows that enter the tower, of each frame pair
        self.selection: Selection | None = None  # as in `EncodedRows`

    @torch.inference_mode()
    @without_cudnn()
    def encode(self, patches: Iterable[torch.Tensor]) -> EncodedRows:
        """Encodes the video. Arguments and errors as of `encode_rows`."""
        with without_autocast() if isinstance(self.visual, Tower) else nullcontext():
            rows = self.embed(patches)
            for layers, stage in self.plan.steps:
                rows = self.run_layers(rows, layers)
                if stage:
                    rows = self.select_rows(rows, stage)
            rows = self.finish(rows)
        layers = list(enumerate(self.computed))
        return EncodedRows(self.plan, rows, self.seed, self.source, layers, self.selection, self.timer, self.checks())

    def embed(self, patches: Iterable[torch.Tensor]) -> Rows:
        """Return the rows before the first layer, one for each unit that is not reused."""
        plan = self.plan
        geo = self.geometry
        values = []
        units = []
        sources = []
        for piece in in_pairs(patches, geo, plan.grid[0], self.piece):
            first = len(self.counts)  # of its frame pairs
            pairs = len(piece) // (geo.units * PATCHES)
            if plan.prunes:
                self.note_colour(piece.view(pairs, -1, piece.shape[1]))
            own = first + arange_on(pairs, self.device)[:, None]
            source = own.expand(pairs, geo.units)
            alive = None
            counts = (geo.units,) * pairs
            if plan.reuse:
                with self.timer:
                    means = patch_means(piece, geo.units, self.normal)
                    source, self.references = scan(means, self.references, threshold=plan.reuse)
                    alive = source == own
                    counts = tuple(alive.sum(1).tolist())  # which waits for an accelerator, once for each piece
            unit = window_order(geo, pairs, alive, sum(counts))
            x = piece.view(-1, PATCHES, piece.shape[1])[unit]
            if x.dtype == torch.uint8:
                x = normalised(x, self.normal)
            if first:
                unit = unit + first * geo.units
            values.append(embed(self.visual, x.to(self.dtype), geo, unit))
            units.append(unit)
            sources.append(source)
            self.counts += counts
        self.source = devices.cat(sources)
        x = devices.cat(values)
        deepstack = x.new_empty(len(x), 0, vision_sizes(self.visual.config).out_hidden_size)
        if not plan.reuse:
            return all_units(x, deepstack, geo, plan.grid[0])
        with self.timer:
            return reused_units(x, deepstack, geo, self.source, self.counts, devices.cat(units))

    def note_colour(self, patches: torch.Tensor) -> None:
        """Notes whether each frame pair of `patches` (`[pairs, n, values]`) has one colour, until one is known not to.

        Then all of its patches are equal within one level of 255.
        """
        if self.one_colour and devices.known_false(self.one_colour[-1]):
            return
        self.one_colour.append((patches.amax(1) - patches.amin(1)).max() < 1 / 255)

    def run_layers(self, rows: Rows, layers: range) -> Rows:
        """Return the rows after `layers`, and after what the hooks do."""
        if not self.hooks and self.visible is None:
            layers = run_by_kernels(self.visual, layers, rows, self.piece, self.after_layer)
        attending = None  # the rows that groups and rotation are of
        for number in layers:
            if number == 0:
                rows = self.call_hooks(0, rows, {})
            if rows is not attending:
                groups = {}
                rotation = rotation_of(self.visual, rows)
                attending = rows
            computed = rows.computed
            needs = frozenset().union(*(hook.needs(number + 1) for hook in self.hooks))
            layer = Layer.of(self.visual, number)
            seen = run_layer(layer, rows, groups, rotation, self.piece, needs, self.timer, self.visible)
            rows = self.call_hooks(number + 1, rows, seen)
            self.after_layer(number + 1, rows, computed)
        return rows

    def call_hooks(self, done: int, rows: Rows, seen: dict[str, torch.Tensor]) -> Rows:
        """Return what the hooks make of the rows after `done` layers; `seen`: as of `Hook`."""
        if not self.hooks:
            return rows
        with self.timer:
            for hook in self.hooks:
                rows = hook(done, rows, seen)
        return rows

    def after_layer(self, done: int, rows: Rows, computed: int) -> None:
        """Called with the number of finished layers, their rows, and how many the last one has computed."""
        self.computed[done - 1] = computed
        inner = vision_sizes(self.visual.config).deepstack_visual_indexes
        if done - 1 in inner:  # it has features for the layer of that number in the language model
            number = inner.index(done - 1)
            features = in_pieces(
                lambda piece: merge_patches(self.visual, piece, number), self.piece, rows.whole().values
            )
            rows.deepstack = torch.cat([rows.deepstack, features[:, None]], 1)
        self.on_layer(done, self.plan.depth)
        self.pause()

    def select_rows(self, rows: Rows, stage: Stage) -> Rows:
        """Return the rows that go on; notes the selection, if the language model reads exactly these rows.

        A selector that asks for no hidden states gets rows after the norm of the next layer, which reduces the few channels that
        are large in all rows. All rows of a video without any change go on if there are few enough of them.
        """
        plan = self.plan
        selector = stage.selector
        max_rows = stage.rows
        reach = "clip"
        if stage.whole_pairs:
            max_rows = plan.keep
            reach = "place"
        self.selection = None
        if not self.finite:  # before the first selection
            self.note_numbers(rows.values, rows.deepstack)
        if max_rows >= len(rows) and not any(self.counts[1:]):
            return rows
        with self.timer:
            order, unit_to_row = rows.unit_order
            seen = rows.values[order]
            if "hidden" not in selector.needs:
                seen = tower_layers(self.visual).norm(self.visual.blocks[stage.first_layer].norm1, seen)
            tokens = Tokens(seen.flatten(1), unit_to_row, plan.grid, self.seed)
            selection = select(selector, tokens, min(max_rows, len(rows)))
            unit_to_token = selection.unit_to_token
            if unit_to_token is None:
                unit_to_token = _nearest_kept(tokens, selection.kept)
            del seen, tokens  # as large as all rows
            left = rows.take(selection, unit_to_token, reach, not selector.drops)
        if not stage.whole_pairs and selector.suffices(len(left), plan.keep, plan.units):
            self.selection = selection
        return left

    def merge_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows `[E, D]` as the language model reads them, from rows `[E, 4, hidden]`."""
        return in_pieces(partial(merge_patches, self.visual), self.piece, x)

    def finish(self, rows: Rows) -> Rows:
        """Return the rows as they leave the encoder, after the patch merger and ordered by unit."""
        rows = rows.whole()
        rows.values = self.merge_patches(rows.values)
        self.note_numbers(rows.values, rows.deepstack)
        return rows.by_unit()

    def note_numbers(self, *rows: torch.Tensor) -> None:
        """Notes whether `rows` are without NaN and infinity; raises ModelError at once where reading values costs nothing."""
        for values in rows:
            if values.numel():
                self.finite.append(all_finite(values))
                if devices.known_false(self.finite[-1]):
                    raise not_a_number_error("encode")

    def checks(self) -> torch.Tensor:
        """Return bool `[3]`, as in `EncodedRows`."""
        numbers = torch.stack(self.finite).all()
        as_planned = _all(self.as_planned, numbers, without=True)
        one_colour = _all(self.one_colour, numbers, without=False)
        return torch.stack([numbers, as_planned, one_colour])


def _all(checks: list[torch.Tensor], like: torch.Tensor, without: bool) -> torch.Tensor:
    """Return whether all checks are true, bool without dimension, as each of them and `like`; `without`: the result for none."""
    if not checks:
        return torch.full_like(like, without)
    return torch.stack(checks).all()


def _nearest_kept(tokens: Tokens, kept: torch.Tensor) -> torch.Tensor:
    """Return int64 `[N]`: which of `kept` (int64 `[K]`) is most similar to each unit, by cosine; for selectors that do not say."""
    rows = F.normalize(tokens.rows.float(), dim=1)
    nearest = closest(rows, rows[tokens.unit_to_row[kept]])[1][tokens.unit_to_row]
    return torch.where(tokens.unit_to_row < 0, -1, nearest).index_copy_(0, kept, arange_on(len(kept), kept.device))


def _hooks(
    plan: EncoderPlan,
    tower: TowerShape,
    merge: Callable[[torch.Tensor], torch.Tensor],
    as_planned: list[torch.Tensor],
) -> list[Hook]:
    """Return what happens after layers beside the selections; `merge`: the patch merger; `as_planned`: as of `Merging`.

    Raises TypeError: stages that cannot be together, or a selector that does not get what it needs. Other errors as of `looks`.
    """
    before = after = []
    if plan.token_stage and plan.token_stage.selector.needs:
        selector = plan.token_stage.selector
        if not all(stage.whole_pairs for stage in plan.row_stages):
            problem = "selects behind a selection between layers, and gets nothing but the rows"
            raise TypeError(f"method {selector.name} {problem}")
        before, after = looks(selector, tower, merge)
    stages = plan.inside_pairs
    aside = [stage.reduce.hook(stage.first_layer) for stage in stages if isinstance(stage.reduce, SetAside)]
    left = {stage.first_layer: stage.reduce.left for stage in stages if isinstance(stage.reduce, Merge)}
    mergers = {stage.reduce.merger for stage in stages if isinstance(stage.reduce, Merge)}
    if len(aside) + len(mergers) > 1:
        raise TypeError("the rows of a frame pair are merged by one merger, or set aside once")
    return [*before, *aside, *(Merging(merger, left, tower, as_planned) for merger in mergers), *after]


@torch.inference_mode()
def select_tokens(video: EncodedRows, question: torch.Tensor | None = None) -> Encoded:
    """Selects the tokens that the language model reads. May be called again with another question.

    `question`: as in `encode`; ignored unless the method reads the question.

    Raises ModelError, RuntimeError: as in `EncodedRows.read_checks`. UsageError, PluginError: as in `token_selection`.
    """
    rows = video.rows
    with video.timer:
        selection = token_selection(video, question)
        kept = devices.to_device(selection.kept, rows.unit.device)
        features = rows.values
        deepstack = rows.deepstack
        if selection is not video.selection:
            here = replace(selection, kept=kept)
            features = rows.mean(features, here)
            deepstack = rows.mean(deepstack, here)
    return video.encoded(features, kept, selection.size, deepstack)


def token_selection(video: EncodedRows, question: torch.Tensor | None = None) -> Selection:
    """Return the units that the language model reads; arguments as in `select_tokens`.

    Raises UsageError: the method reads the question, and there is none. PluginError: as `methods.selecting.select`.
    """
    tokens = video.selector_input
    unit = video.rows.unit
    keep = video.plan.keep
    stage = video.plan.token_stage
    if video.selection is not None or not video.plan.prunes:
        return video.selection or Selection(unit)
    if stage is None:
        if len(unit) <= keep:
            return Selection(unit)
        size = bincount_fixed(tokens.unit_to_row, len(unit))
        return Selection(unit[_largest(size, keep)])
    selector = stage.selector
    if selector.reads_question:
        if question is None:
            problem = f"method {selector.name} reads the question, and there is none here"
            raise UsageError(problem, "give the question with the video, or take another method")
        tokens = replace(tokens, given={**tokens.given, "question": question.to(unit.device).float()})
    if stage.inflection:
        keep = tokens_before_inflection(selector, tokens, keep)
    return select(selector, tokens, keep)


def _largest(size: torch.Tensor, keep: int) -> torch.Tensor:
    """Return int64 `[keep]`, ascending: the rows of largest cluster `size` (int64 `[E]`); among equal ones, at even distances.

    This serves counts below one row per frame pair, which merging inside frame pairs cannot reach.
    """
    order = arange_on(len(size), size.device)
    even = order * keep // len(size)  # a new value marks each row of an even selection
    first = torch.cat([torch.ones(1, dtype=torch.bool, device=size.device), even[1:] != even[:-1]])
    rank = (size * 2 + first).argsort(descending=True, stable=True)
    return rank[:keep].sort().values
