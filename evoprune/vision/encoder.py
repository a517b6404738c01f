"""The pruned vision encoder: embed, run layers, select rows, run the remaining layers, merge patches, select tokens.

All rows of a video go through a layer before the next layer starts. To limit temporary memory, each matrix product processes a
limited number of rows at a time, and attention a limited number of windows or frame pairs (tower.py). Except for rounding, the
result doesn't depend on these limits. Without pruning, the output matches Hugging Face's.

Each step of the plan runs some layers and can then select rows from the whole video. After a selection, a unit may be represented
by a row from another frame pair, in which case the unit's own frame pair attends to that row too. Rows are merged or set aside only
within frame pairs, by hooks that run after a layer (hooks.py). Finally, `TowerOutput.select_tokens` selects the language model's
tokens from the tower's output rows.

The plan specifies the number of rows that each layer computes, so all shapes are known without reading values from the GPU. The
encoder synchronizes with the GPU only when it selects rows between layers, when it reads all checks at the end, and during reuse if
the patches are on the GPU.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from evoprune.backend import Device, Timer, read_or, snap, to_device, without_cudnn
from evoprune.errors import UsageError, not_a_number_error
from evoprune.methods import (
    EncoderPlan,
    Selection,
    SetAside,
    Stage,
    Tokens,
    TowerShape,
    arange_on,
    select,
)
from evoprune.model import PATCHES, Tower, VisionConfig, all_finite, without_autocast
from evoprune.suggestions import Suggesting
from evoprune.vision.families import embed, merge_patches, merger_norm, tower_layers
from evoprune.vision.layout import bincount_fixed, cat, geometry, window_order
from evoprune.vision.patches import (
    CLIP,
    Normal,
    ReferenceBlocks,
    in_pairs,
    normalised,
    origins,
    patch_means,
    predicted_units,
    scan,
)
from evoprune.vision.rows import Rows, all_units, predicted_rows, reused_units
from evoprune.vision.tower import (
    Layer,
    Visible,
    in_pieces,
    rotation_of,
    run_by_kernels,
    run_layer,
)

if TYPE_CHECKING:
    from evoprune.vision.hooks import Hook

ROWS_AT_ONCE = 512  # number of rows of the cosine-similarity matrix to hold in memory at a time


@dataclass(frozen=True, repr=False)
class Encoded(Suggesting):
    """One encoded video, or the concatenation of several encoded videos, ready for the language model."""

    features: torch.Tensor  # `[K, D]`, the tokens
    kept: torch.Tensor  # int64 `[K]`, the unit at each token's position, ascending (in Hugging Face's order)
    rows: torch.Tensor  # `[E, D]`, the rows computed by the encoder, sorted by unit
    unit_to_row: torch.Tensor  # int64 `[N]`, each unit's index into `rows`, or -1 for dropped units
    grids: tuple[tuple[int, int, int], ...]  # (T, H, W) in units, one per video
    layers: list[tuple[int, int]]  # pairs of a layer and the number of rows it computed for all videos
    prune_seconds: float  # portion of the encoding time spent on scoring, merging, and selecting
    flat: bool = False  # whether every frame pair has a single color, so all its units look the same
    # float32 `[K]`, each token's weight in the language model's attention, which adds log(size) to the logits. The `evoprune`
    # method uses (cluster size) ** count, which is the square root by default. None means a weight of 1 for all tokens.
    size: torch.Tensor | None = None
    # `[n, K, D]`, the features to add to the tokens after each of the language model's first n layers
    deepstack: torch.Tensor | None = None
    kept_on_cpu: torch.Tensor | None = None  # a copy of `kept` on the CPU, or None if it has not been copied yet
    after_tower_below: int = 0  # see `EncoderPlan`; for several videos, the maximum
    # If the method reads the question, the rows that tokens are selected from; before the first selection, there are no tokens.
    selectable: "TowerOutput | None" = None

    def __repr__(self) -> str:
        tokens, width = self.features.shape
        return f"<Encoded: {tokens:,} of {len(self.unit_to_row):,} visual tokens, {width} numbers each, grids {list(self.grids)}>"

    @property
    def live_share(self) -> float:
        """The fraction of a video's units computed by a layer, averaged over layers. The tower's run time is proportional to it."""
        return sum(rows for _, rows in self.layers) / len(self.layers) / len(self.unit_to_row)

    @cached_property
    def kept_here(self) -> torch.Tensor:
        """A cached copy of `kept` on the CPU. Without the cache, each copy from an accelerator would synchronize."""
        return self.kept.cpu() if self.kept_on_cpu is None else self.kept_on_cpu

    @property
    def every_size(self) -> torch.Tensor:
        """Token weights, float32 `[K]`: `size`, or all ones if `size` is None."""
        if self.size is None:
            return self.features.new_ones(len(self.kept), dtype=torch.float32)
        return self.size

    @property
    def every_feature(self) -> torch.Tensor:
        """Tokens followed by their DeepStack features, `[(1 + n) K, D]`."""
        if self.deepstack is None:
            return self.features
        return torch.cat([self.features, *self.deepstack])

    @property
    def kept_per_pair(self) -> list[int]:
        """The number of tokens in each frame pair, across all videos in order."""
        kept = self.kept_here.tolist()
        ends = accumulate(h * w for t, h, w in self.grids for _ in range(t))
        return [after - before for before, after in pairwise([0, *(bisect_left(kept, end) for end in ends)])]

    @property
    def keep(self) -> int:
        """The number of tokens that the language model will read."""
        return self.selectable.plan.keep if self.selectable else len(self.kept)

    def own(self) -> "Encoded":
        """Return a copy without tokens and with its own timer, or the object itself if the method doesn't read the question."""
        if self.selectable is None:
            return self
        return replace(self.selectable, timer=self.selectable.timer.copy()).nothing_selected()

    def for_question(self, question: torch.Tensor) -> "Encoded":
        """Return the tokens selected for a question, or the object itself if the method doesn't read the question.

        Args:
            question: See `TowerOutput.select_tokens`.
        """
        if self.selectable is None:
            return self
        return replace(self.selectable.select_tokens(question), selectable=self.selectable)

    @staticmethod
    def joined(videos: "list[Encoded]") -> "Encoded":
        """Concatenate several encoded videos. Unit and row numbers continue from one video to the next."""
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
                [
                    torch.where(v.unit_to_row >= 0, v.unit_to_row + first, -1)
                    for v, first in zip(videos, rows, strict=False)
                ]
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
class TowerOutput:
    """The output of the vision tower for one video, before the language model's tokens are selected from its rows."""

    plan: EncoderPlan
    rows: Rows  # sorted by unit
    seed: int  # see `Tokens`
    source: torch.Tensor  # int64 `[T, H*W]`, the frame pair whose pixels represent each unit
    layers: list[tuple[int, int]]  # see `Encoded`
    selection: Selection | None  # the last selection inside the tower, if its rows are exactly the final tokens
    timer: Timer  # measures the pruning time
    # bool `[3]`: whether all values are finite, whether mergers removed the planned number of rows, and whether every frame pair
    # has a single color. These values are read only at the end because reading them synchronizes.
    checks: torch.Tensor
    merger_norm: torch.Tensor  # see `Tokens`

    @cached_property
    def selector_input(self) -> Tokens:
        """The token selector's input: the rows together with the grid and the seed."""
        rows = self.rows
        return Tokens(rows.values, rows.unit_to_row, self.plan.grid, self.seed, rows.given, self.merger_norm)

    @property
    def reads_question(self) -> bool:
        """Whether tokens are selected for a question."""
        stage = self.plan.token_stage
        return stage is not None and stage.selector.reads_question

    def tokens(self) -> Encoded:
        """Return the visual tokens. If the method reads the question, there aren't any until `Encoded.for_question` is called."""
        return self.nothing_selected() if self.reads_question else self.select_tokens()

    @torch.inference_mode()
    def select_tokens(self, question: torch.Tensor | None = None) -> Encoded:
        """Select the visual tokens for the language model. Can be called again with a different question.

        Args:
            question: `[Q, D]`, the question's token embeddings. Ignored unless the method reads the question.

        Raises:
            ModelError, RuntimeError: See `read_checks`.
            UsageError, PluginError: See `token_selection`.
        """
        rows = self.rows
        with self.timer:
            selection = self.token_selection(question)
            kept = to_device(selection.kept, rows.unit.device)
            features = rows.values
            deepstack = rows.deepstack
            if selection is not self.selection:
                here = replace(selection, kept=kept)
                features = rows.mean(features, here)
                deepstack = rows.mean(deepstack, here)
        return self.encoded(features, kept, selection.size, deepstack)

    def token_selection(self, question: torch.Tensor | None = None) -> Selection:
        """Return the token selection for the language model. For the argument, see `select_tokens`.

        Raises:
            UsageError: If the method reads the question but `question` is None.
            PluginError: See `methods.selecting.select`.
        """
        tokens = self.selector_input
        unit = self.rows.unit
        keep = self.plan.keep
        stage = self.plan.token_stage
        if self.selection is not None or not self.plan.prunes:
            return self.selection or Selection(unit)
        if stage is None:
            if len(unit) <= keep:
                return Selection(unit)
            size = bincount_fixed(tokens.unit_to_row, len(unit))
            return Selection(unit[_largest_clusters(size, keep)])
        selector = stage.selector
        if selector.reads_question:
            if question is None:
                problem = f"method {selector.name} reads the question, but there is no question"
                raise UsageError(problem, "pass the question with the video, or use another method")
            tokens = replace(tokens, given={**tokens.given, "question": question.to(unit.device).float()})
        return select(selector, tokens, keep, stage.inflection)

    def nothing_selected(self) -> Encoded:
        """Return an `Encoded` without tokens, for methods that can't select tokens until the question is known."""
        rows = self.rows
        empty = self.encoded(rows.values[:0], rows.unit[:0], None, rows.deepstack[:0])
        return replace(empty, selectable=self)

    def encoded(
        self, features: torch.Tensor, kept: torch.Tensor, size: torch.Tensor | None, deepstack: torch.Tensor
    ) -> Encoded:
        """Read the checks and return an `Encoded` with the given tokens. Raises the same exceptions as `read_checks`.

        Args:
            features, kept, size: See `Encoded`.
            deepstack: `[K, n, D]`, the tokens' DeepStack features.
        """
        flat, seconds, kept_on_cpu = self.read_checks(kept)
        by_layer = None
        if deepstack.shape[1]:
            by_layer = deepstack.transpose(0, 1)
        return Encoded(
            features=features,
            kept=kept,
            rows=self.rows.values,
            unit_to_row=self.rows.unit_to_row,
            grids=(self.plan.grid,),
            layers=self.layers,
            prune_seconds=seconds,
            flat=flat,
            size=size,
            deepstack=by_layer,
            kept_on_cpu=kept_on_cpu,
            after_tower_below=self.plan.after_tower_below,
        )

    def read_checks(self, kept: torch.Tensor) -> tuple[bool, float, torch.Tensor]:
        """Read all checks and `kept` from the device in a single transfer.

        Returns:
            Whether every frame pair has a single color, the pruning time in seconds, and a copy of `kept` on the CPU.

        Raises:
            ModelError: If a row contains NaN or infinite values.
            RuntimeError: If a merger didn't remove the planned number of rows.
        """
        checks, kept = _read_together(self.checks, kept)
        finite, as_planned, flat = map(bool, checks.tolist())
        if not finite:
            raise not_a_number_error("encode")
        if not as_planned:
            name = self.plan.stages[0].reduce.merger.name
            raise RuntimeError(f"method {name} did not remove the requested number of rows")
        return flat, self.timer.seconds(), kept


def encode_rows(visual, patches: Iterable[torch.Tensor], plan: EncoderPlan, **options: Any) -> TowerOutput:
    """Run the vision tower on a video.

    To select tokens, call `TowerOutput.select_tokens` on the result, which may require a question.

    Args:
        visual: The vision tower: either a `model.weights.Tower` or a transformers tower from a supported family. Under torch's
            autocast, a transformers tower computes in the autocast dtype, and the rows have that dtype too.
        patches: The whole video in pieces `[n, values]`. Values are either pixels (uint8) or normalized by a processor.
        plan: A plan for this tower, as returned by `MethodChain.plan`.
        options: Keyword arguments for `EncoderRun`.

    Raises:
        ValueError: If the number of patches doesn't match the grid.
        ModelError: If the tower computes NaN or infinite values.
    """
    return EncoderRun(visual, plan, **options).encode(patches)


class EncoderRun:
    """Encodes a single video and holds its encoding state.

    Args:
        visual, plan: See `encode_rows`.
        normal: The color mean and standard deviation for normalizing pixels.
        seed: See `Tokens`.
        piece_units: The number of rows per matrix product and the number of units to embed at a time. Defaults to
            `Device.piece_units`. Larger values require more temporary memory. With 16-bit dtypes, the value can also affect
            rounding because matrix products of different sizes may round differently.
        on_layer: A function called after every layer with the number of finished layers and the total number of layers.
        pause: A function called after every layer, which may block.
    """

    visible: Visible | None = None  # see `run_layer`

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
        tower = TowerShape.of_tower(visual)
        self.visual = visual
        self.plan = plan
        self.normal = normal
        self.seed = seed
        self.device = weight.device
        self.dtype = weight.dtype
        self.geometry = geometry(*plan.grid[1:], tower.window, str(self.device))
        self.piece = piece_units or Device(self.device).piece_units
        self.on_layer = on_layer
        self.pause = pause
        self.timer = Timer(self.device)
        # Reuse state after the frame pairs embedded so far.
        self.references: ReferenceBlocks | None = None
        self.previous: torch.Tensor | None = (
            None  # the pixels of the last frame pair embedded so far, see `predicted_units`
        )
        # These lists of 0-d bool tensors are combined in `checks`.
        self.single_color: list[torch.Tensor] = []  # for each piece, whether every frame pair has a single color
        self.finite: list[torch.Tensor] = []  # for each checked tensor, whether all values are finite
        self.as_planned: list[torch.Tensor] = []  # for each merge, whether it left the planned number of rows
        self.hooks = _hooks(plan, tower, lambda x: self.merge_patches(x.to(self.dtype)), self.as_planned)
        self.computed = [0] * tower.depth  # number of rows computed by each layer
        self.source: torch.Tensor | None = None  # see `TowerOutput`
        self.counts: tuple[int, ...] = ()  # number of rows that enter the tower, by frame pair
        self.selection: Selection | None = None  # see `TowerOutput`

    @torch.inference_mode()
    @without_cudnn()
    def encode(self, patches: Iterable[torch.Tensor]) -> TowerOutput:
        """Encode the video. For the argument and the exceptions, see `encode_rows`."""
        with without_autocast() if isinstance(self.visual, Tower) else nullcontext():
            rows = self.embed(patches)
            for layers, stage in self.plan.steps:
                rows = self.run_layers(rows, layers)
                if stage:
                    rows = self.select_rows(rows, stage)
            rows = self.finish(rows)
        layers = list(enumerate(self.computed))
        return TowerOutput(
            plan=self.plan,
            rows=rows,
            seed=self.seed,
            source=self.source,
            layers=layers,
            selection=self.selection,
            timer=self.timer,
            checks=self.checks(),
            merger_norm=merger_norm(self.visual),
        )

    def embed(self, patches: Iterable[torch.Tensor]) -> Rows:
        """Embed the patches and return the first layer's input rows, one for each unit to encode."""
        plan = self.plan
        geo = self.geometry
        values = []
        units = []
        sources = []
        parents = []
        for piece in in_pairs(patches, geo, plan.grid[0], self.piece):
            first = len(self.counts)  # the index of the first frame pair in this piece
            pairs = len(piece) // (geo.units * PATCHES)
            if plan.prunes:
                self.note_color(piece.view(pairs, -1, piece.shape[1]))
            own = first + arange_on(pairs, self.device)[:, None]
            source = own.expand(pairs, geo.units)
            alive = None
            counts = (geo.units,) * pairs
            if plan.reuse:
                with self.timer:
                    means = patch_means(piece, geo.units, self.normal)
                    source, self.references = scan(means, self.references, threshold=plan.reuse)
                    alive = source == own
                    counts = tuple(alive.sum(1).tolist())  # synchronizes with the accelerator once per piece
            if plan.predict:
                with self.timer:
                    parent, self.previous = predicted_units(piece, geo, first, self.previous)
                    parents.append(parent)
                    alive = parent == arange_on(pairs * geo.units, self.device).view(parent.shape) + first * geo.units
                    counts = tuple(alive.sum(1).tolist())  # synchronizes, too
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
        self.source = cat(sources)
        x = cat(values)
        deepstack = x.new_empty(len(x), 0, VisionConfig.of(self.visual.config).out_hidden_size)
        if plan.predict:
            with self.timer:
                origin = origins(cat(parents).flatten())
                self.source = (origin // geo.units).view(self.source.shape)
                return predicted_rows(x, deepstack, geo, origin, self.counts, cat(units))
        if not plan.reuse:
            return all_units(x, deepstack, geo, plan.grid[0])
        with self.timer:
            return reused_units(x, deepstack, geo, self.source, self.counts, cat(units))

    def note_color(self, patches: torch.Tensor) -> None:
        """Record whether every frame pair in `patches` (`[pairs, n, values]`) consists of a single color.

        A frame pair has a single color if its patches differ by less than one level out of 255. On the CPU, the check is skipped
        after the first frame pair with more than one color.
        """
        if self.single_color and read_or(lambda: not self.single_color[-1], self.single_color[-1], False):
            return
        self.single_color.append((patches.amax(1) - patches.amin(1)).max() < 1 / 255)

    def run_layers(self, rows: Rows, layers: range) -> Rows:
        """Run some layers, with hooks after each layer. Returns the new rows."""
        if not self.hooks and self.visible is None:
            layers = run_by_kernels(self.visual, layers, rows, self.piece, self.after_layer)
        attending = None  # the rows for which `groups` and `rotation` were computed
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
        """Run all hooks and return the rows for the next layer. For the arguments, see `Hook`."""
        if not self.hooks:
            return rows
        with self.timer:
            for hook in self.hooks:
                rows = hook(done, rows, seen)
        return rows

    def after_layer(self, done: int, rows: Rows, computed: int) -> None:
        """Record the number of rows computed by a layer, collect DeepStack features, and report progress.

        Args:
            done: The number of finished layers, including this one.
            rows: The rows after this layer and its hooks.
            computed: The number of rows computed by this layer.
        """
        self.computed[done - 1] = computed
        inner = VisionConfig.of(self.visual.config).deepstack_visual_indexes
        if done - 1 in inner:  # the n-th listed layer provides the features for the language model's n-th layer
            number = inner.index(done - 1)
            features = in_pieces(
                lambda piece: merge_patches(self.visual, piece, number), self.piece, rows.whole().values
            )
            rows.deepstack = torch.cat([rows.deepstack, features[:, None]], 1)
        self.on_layer(done, self.plan.depth)
        self.pause()

    def select_rows(self, rows: Rows, stage: Stage) -> Rows:
        """Run a stage's selector, and return the rows to compute in the remaining layers.

        Selectors normally see the rows after the next layer's norm, which scales down the few channels that are large in every row.
        Selectors that need "hidden" see the rows before this norm. If only the first frame pair has rows and their number is within
        the stage's budget, all of them are kept. The selection is recorded if its rows can be used as the tokens without another
        selection.
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
            self.note_finite(rows.values, rows.deepstack)
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
            del seen, tokens  # they are as large as the rows, so free their memory before copying the rows
            left = rows.take(selection, unit_to_token, reach, not selector.drops)
        if not stage.whole_pairs and selector.suffices(len(left), plan.keep, plan.units):
            self.selection = selection
        return left

    def merge_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the patch merger to rows of shape `[E, 4, hidden]`. Returns `[E, D]`."""
        return in_pieces(partial(merge_patches, self.visual), self.piece, x)

    def finish(self, rows: Rows) -> Rows:
        """Apply the patch merger to all rows, including those set aside, and sort them by unit."""
        rows = rows.whole()
        rows.values = self.merge_patches(rows.values)
        self.note_finite(rows.values, rows.deepstack)
        return rows.by_unit()

    def note_finite(self, *rows: torch.Tensor) -> None:
        """Record whether all values in `rows` are finite. On the CPU, raise ModelError immediately if any are not."""
        for values in rows:
            if values.numel():
                self.finite.append(all_finite(values))
                if read_or(lambda: not self.finite[-1], self.finite[-1], False):
                    raise not_a_number_error("encode")

    def checks(self) -> torch.Tensor:
        """Combine all recorded checks into a bool `[3]` tensor for `TowerOutput.checks`."""
        finite = torch.stack(self.finite).all()
        as_planned = _all_true(self.as_planned, finite, without=True)
        single_color = _all_true(self.single_color, finite, without=False)
        return torch.stack([finite, as_planned, single_color])


def _all_true(checks: list[torch.Tensor], like: torch.Tensor, without: bool) -> torch.Tensor:
    """Return whether all checks are True, as a 0-d bool tensor on the device of `like`.

    If there are no checks, return `without`.
    """
    if not checks:
        return torch.full_like(like, without)
    return torch.stack(checks).all()


def _nearest_kept(tokens: Tokens, kept: torch.Tensor) -> torch.Tensor:
    """Find the kept unit with the highest cosine similarity to each unit. Returns int64 `[N]`, indices into `kept` (int64 `[K]`).

    The result is used as `unit_to_token` for selectors that don't return one.
    """
    rows = F.normalize(tokens.rows.float(), dim=1)
    chosen = rows[tokens.unit_to_row[kept]]
    nearest = torch.cat([snap(chunk @ chosen.T).max(1).indices for chunk in rows.split(ROWS_AT_ONCE)])[
        tokens.unit_to_row
    ]
    return torch.where(tokens.unit_to_row < 0, -1, nearest).index_copy_(0, kept, arange_on(len(kept), kept.device))


def _hooks(
    plan: EncoderPlan,
    tower: TowerShape,
    merge: Callable[[torch.Tensor], torch.Tensor],
    as_planned: list[torch.Tensor],
) -> "list[Hook]":
    """Create the hooks required by a pruning method's plan, in execution order.

    Args:
        merge: The patch merger.
        as_planned: See `Merging`.

    Raises:
        TypeError: If the stages can't be combined, or if a selector needs unavailable data (see also `selector_hooks`).
    """
    before = after = []
    if plan.token_stage and plan.token_stage.selector.needs:
        selector = plan.token_stage.selector
        if not all(stage.whole_pairs for stage in plan.row_stages):
            problem = "cannot get more than rows after a selection between layers"
            raise TypeError(f"method {selector.name} {problem}")
        from evoprune.vision.hooks import selector_hooks

        before, after = selector_hooks(selector, tower, merge)
    stages = plan.inside_pairs
    aside = [stage.reduce.hook(stage.first_layer) for stage in stages if isinstance(stage.reduce, SetAside)]
    merging = [stage for stage in stages if not isinstance(stage.reduce, SetAside)]
    left = {stage.first_layer: stage.reduce.left for stage in merging}
    mergers = {stage.reduce.merger for stage in merging}
    if len(aside) + len(mergers) > 1:
        raise TypeError("inside frame pairs, only one merger or one stage that sets rows aside can act")
    hooks = [*before, *aside]
    if mergers:
        from evoprune.vision.merging import Merging

        hooks += [Merging(merger, left, tower, as_planned) for merger in mergers]
    return [*hooks, *after]


def _largest_clusters(size: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the indices of the rows with the largest clusters, int64 `[keep]`, ascending.

    Ties are broken in favor of evenly spaced rows. Merging within frame pairs always leaves at least one row per frame pair. If the
    budget is smaller than that, this function drops the excess rows.

    Args:
        size: int64 `[E]`, the cluster sizes.
    """
    order = arange_on(len(size), size.device)
    even = order * keep // len(size)  # rows where this value changes are evenly spaced
    first = torch.cat([torch.ones(1, dtype=torch.bool, device=size.device), even[1:] != even[:-1]])
    rank = (size * 2 + first).argsort(descending=True, stable=True)
    return rank[:keep].sort().values


def _read_together(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy two one-dimensional tensors to the CPU. On an accelerator, both are transferred together as int64."""
    if on_cpu := read_or(lambda: (first, second), second, None):
        return on_cpu
    return torch.cat([first.long(), second]).cpu().split([len(first), len(second)])
