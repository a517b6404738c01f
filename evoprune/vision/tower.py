"""Runs the layers of a vision tower on rows of a video, with a model's weights, rounded as in Hugging Face's code.

What happens between layers is a `Reduction`; what a selector needs of them, `Gathering` collects.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from evoprune.backend.devices import Timer
from evoprune.cpu.linear import linear
from evoprune.methods.base import Selector
from evoprune.methods.plans import TowerShape
from evoprune.methods.ranking import unit_features
from evoprune.methods.types import ascending
from evoprune.model.config import VisionConfig, vision_sizes
from evoprune.vision import fused
from evoprune.vision.attention import Plan, attention_received, grouped_attention, plan_attention
from evoprune.vision.chunks import CarriedKeys
from evoprune.vision.families import Layers, layers_of, merge_patches
from evoprune.vision.layout import Geometry, Scope, TokenLayout, geometry

Compared = tuple[torch.Tensor | None, torch.Tensor | None]
Reduced = tuple[torch.Tensor, TokenLayout]
KNOWN = ("attention", "keys", "middle")
MIDDLE = 7 / 32, 23 / 32  # the layers of "middle", in relative depth: those of Nuwa (arXiv 2602.02951)


class Reduction:
    """The base of what merges rows or sets them aside (reductions.py); one object a chunk."""

    size_bias: bool = True  # whether attention weighs a row by its cluster size inside the group
    needs: frozenset[str] = frozenset()  # what `after` compares of a layer: as in `Merger.needs`

    def begin(self, x: torch.Tensor) -> None:
        """Notes the rows before the first layer, `[R, 4, hidden]`."""

    def active(self, layer: int) -> torch.Tensor | None:
        """int64: the rows that go through the layer's MLP; None for all."""
        return None

    def acts(self, layer: int, layout: TokenLayout) -> bool:
        """Whether `after` changes anything after a layer."""
        return False

    def after(self, layer: int, scope: Scope, x: torch.Tensor, layout: TokenLayout, compared: Compared) -> Reduced:
        """The rows for the next layer and their layout, from `x` (`[R, 4, hidden]`) after a layer whose attention has `scope`.

        `compared`: keys (`[R, 4, heads, d]`) and attention received (float32 `[R]`) of the layer, None unless `needs` asks for it.
        """
        return x, layout

    def all_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The states `[R', 4, hidden]` of all rows that leave the tower, from those that a layer has computed."""
        return x

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[R', ...]` of all rows that leave the tower, from those of the rows of a layer."""
        return values

    def joined(self, values: torch.Tensor, before: TokenLayout, after: TokenLayout) -> torch.Tensor:
        """Values `[R', ...]` of all rows that leave the tower, as `after` has changed their layout `before` into another one."""
        return values


class Gathering:
    """Collects what a selector needs, chunk after chunk; attention and keys are those of the tower's last full-attention layer.

    `merge`: the patch merger, from float32 `[R, 4, hidden]` to `[R, D]`.

    Raises TypeError: the selector needs something unknown. ValueError: the tower has no full-attention layer.
    """

    def __init__(self, selector: Selector, tower: TowerShape, merge: Callable[[torch.Tensor], torch.Tensor]):
        if unknown := sorted(selector.needs - set(KNOWN)):
            known = f"after the encoder there is {', '.join(KNOWN)}"
            raise TypeError(f"method {selector.name} needs {unknown[0]!r}; {known}")
        if not tower.full_layers:
            raise ValueError(f"method {selector.name} needs a full-attention layer, and this tower has none")
        self.layer = max(tower.full_layers)  # that is looked at
        first, last = (min(round(share * tower.depth), tower.depth - 1) for share in MIDDLE)
        # After which states are added
        self.middle = range(first, last + 1) if "middle" in selector.needs else range(0)
        self._merge = merge
        self._states: torch.Tensor | None = None
        self._collected: dict[str, list[torch.Tensor]] = {name: [] for name in sorted(selector.needs)}
        self._seen: dict[str, torch.Tensor] | None = None

    def look(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        plain: torch.Tensor,
        layout: TokenLayout,
        groups: Plan,
        spread: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Computes the values of one chunk, in that layer; `q`, `k`, `groups` as in `attention_received`, of frame pairs.

        `plain`: `[R, 4, heads, d]`, keys before rotary; `spread`: the values of all rows of the chunk, of those of the layer.
        """
        self._seen = {}
        if "attention" in self._collected:
            self._seen["attention"] = spread(attention_received(q, k, groups)[: len(q)] * layout.geometry.units)
        if "keys" in self._collected:
            self._seen["keys"] = spread(unit_features(plain))

    def add_states(self, x: torch.Tensor) -> None:
        """Adds the rows of one chunk after one of the layers `middle`, `[R, 4, hidden]`, to the states of which it is the mean."""
        share = x.float() / len(self.middle)
        self._states = share if self._states is None else self._states + share

    def finish(self, order: torch.Tensor) -> None:
        """Stores the values of a chunk; `order`, int64 `[R]`, sorts its rows by unit."""
        if self._seen is None:  # the chunk has no rows
            return
        values, self._seen = self._seen, None
        if self._states is not None:
            values["middle"], self._states = self._merge(self._states).float(), None
        for name, value in values.items():
            self._collected[name].append(value[order])

    def collected(self) -> dict[str, torch.Tensor]:
        """The values of the whole video by name, float32 `[E, ...]`, rows ordered by unit."""
        return {name: torch.cat(pieces) for name, pieces in self._collected.items()}


@lru_cache(maxsize=16)
def rotary(sizes: VisionConfig, geo: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary embedding, float32 `[units, 4, 1, 1, head_dim]` each, by raster place.

    The first half of the sines is negated. One half of the angles depends on the patch's y, the other half on its x.
    """
    merge, quarter = sizes.spatial_merge_size, sizes.hidden_size // sizes.num_heads // 4
    speed = 10000.0 ** (torch.arange(quarter, dtype=torch.float32, device=geo.device) / -quarter)
    y, x = torch.meshgrid(ascending(geo.height, geo.device), ascending(geo.width, geo.device), indexing="ij")
    dy, dx = torch.meshgrid(ascending(merge, geo.device), ascending(merge, geo.device), indexing="ij")
    at = torch.stack([(y.flatten()[:, None] * merge + dy.flatten()), (x.flatten()[:, None] * merge + dx.flatten())], -1)
    angle = (at[..., None].float() * speed).flatten(2)[:, :, None, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` (`[R, 4, 2, heads, d]`) turned in float32 by `cos` and `sin` (float32 `[R, 4, 1, 1, d]`)."""
    wide = x.float()
    other = wide.roll(x.shape[-1] // 2, -1)
    return (wide * cos).addcmul_(other, sin).to(x.dtype)


def tower_shape(visual) -> TowerShape:
    """The properties of the tower `visual` (`model.model.visual`) that plans depend on."""
    sizes = vision_sizes(visual.config)
    window = sizes.window_size // sizes.patch_size // sizes.spatial_merge_size
    return TowerShape(len(visual.blocks), sizes.fullatt_block_indexes, window)


def tower_geometry(visual, height: int, width: int) -> Geometry:
    """The windows into which this tower divides a frame pair of height x width units."""
    return geometry(height, width, tower_shape(visual).window, str(visual.patch_embed.proj.weight.device))


@dataclass
class LayerRun:
    """What `run_layers` needs beside rows and layout."""

    visual: torch.nn.Module
    timer: Timer  # of pruning
    computed: list[int]  # rows of each of the tower's layers so far, to which those of these layers are added
    reduction: Reduction = field(default_factory=Reduction)  # what is done with rows between two layers
    carried: CarriedKeys | None = None  # rows of earlier chunks that this chunk attends to; None without reuse
    gathering: Gathering | None = None  # collects the inputs of a selector
    mlp_rows: int | None = None  # rows that go through an MLP at a time, which bounds the memory; None for all
    on_layer: Callable[[int], None] = lambda done: None  # called after each layer with the number of finished layers
    # `[R', n, D]`, the DeepStack features of the rows that leave, of the n layers with some so far; None at first
    deepstack: torch.Tensor | None = None


@dataclass
class _LayerRows:
    """Rows with their layout, and values that depend on the layout alone."""

    x: torch.Tensor  # `[R, 4, hidden]`, in window order
    layout: TokenLayout
    rotation: list[torch.Tensor]  # cos and sin of each row, `[R, 4, 1, 1, d]`
    groups: dict[Scope, Plan] = field(default_factory=dict)  # by scope, once they are made


def run_layers(run: LayerRun, layers: range, x: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, TokenLayout]:
    """Rows `[R, 4, hidden]`, in window order, after neighbouring layers of the tower; and their layout, for there may be fewer."""
    tower, sizes = tower_shape(run.visual), vision_sizes(run.visual.config)
    if run.deepstack is None:
        run.deepstack = x.new_empty(len(x), 0, sizes.out_hidden_size)
    if not layers or not layout.rows:  # all units are reused
        return x, layout
    table, reduction = rotary(sizes, layout.geometry), run.reduction
    if run.carried is None and run.gathering is None and type(reduction) is Reduction and fused.can_fuse(x):
        x, layers = _run_fused(run, layers, x, layout, table)

    def laid_out(x: torch.Tensor, layout: TokenLayout) -> _LayerRows:
        return _LayerRows(x, layout, [of_place[layout.place] for of_place in table])

    rows = laid_out(x, layout)
    reduction.begin(x)
    for layer in layers:
        compared = _attend(run, tower, layer, rows)
        _transform(run, layer, rows)
        if reduction.acts(layer, rows.layout):
            with run.timer:
                before = rows.layout
                rows.x, layout = reduction.after(layer, tower.scope(layer), rows.x, before, compared)
                if layout is not before:
                    run.deepstack = reduction.joined(run.deepstack, before, layout)
                    rows = laid_out(rows.x, layout)
        if layer in sizes.deepstack_visual_indexes:
            _add_deepstack(run, sizes.deepstack_visual_indexes.index(layer), reduction.all_rows(rows.x))
        if run.gathering and layer in run.gathering.middle:
            run.gathering.add_states(reduction.all_rows(rows.x))
        run.on_layer(layer + 1)
    return rows.x, rows.layout


def _run_fused(
    run: LayerRun, layers: range, x: torch.Tensor, layout: TokenLayout, table: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, range]:
    """Rows after `layers` by the kernels of a GPU, and the layers that are left."""
    inner = vision_sizes(run.visual.config).deepstack_visual_indexes

    def after(layer: int, x: torch.Tensor) -> None:
        run.computed[layer] += len(x)
        if layer in inner:
            _add_deepstack(run, inner.index(layer), x)
        run.on_layer(layer + 1)

    return fused.run_layers(run.visual, tower_shape(run.visual), layers, x, layout, table, run.mlp_rows, after)


def _add_deepstack(run: LayerRun, number: int, x: torch.Tensor) -> None:
    """Adds the features that rows `[R', 4, hidden]` have for layer `number` of the language model."""
    made = _in_pieces(run, lambda piece: merge_patches(run.visual, piece, number), x)
    run.deepstack = torch.cat([run.deepstack, made[:, None]], 1)


def _attend(run: LayerRun, tower: TowerShape, layer: int, rows: _LayerRows) -> Compared:
    """The first half of a layer: attention, added to the rows. Returns what `Reduction.after` compares."""
    visual, layout, x = run.visual, rows.layout, rows.x
    block, kind, scope = visual.blocks[layer], layers_of(visual), tower.scope(layer)
    qkv = linear(block.attn.qkv, kind.norm(block.norm1, x))
    qkv = qkv.view(*x.shape[:2], 3, vision_sizes(visual.config).num_heads, -1)
    q, k = rotate(qkv[:, :, :2], *rows.rotation).unbind(2)
    v, plain, rotated = qkv[:, :, 2], qkv[:, :, 1], k
    if run.carried:
        k, v = run.carried.seen_by(layer, k, v, layout)
    if scope not in rows.groups:  # made once for a layout
        # Before rows merge, the log of every cluster size is 0.
        size_bias = run.reduction.size_bias and layout.reach != "place"
        rows.groups[scope] = plan_attention(layout, scope, q, size_bias)
    groups = rows.groups[scope]
    needs = run.reduction.needs if run.reduction.acts(layer, layout) else ()
    received = torch.zeros(len(k), dtype=torch.float32, device=k.device) if "attention" in needs else None
    mixed = grouped_attention(q, k, v, groups, received, run.timer)
    if run.gathering and layer == run.gathering.layer:
        with run.timer:
            run.gathering.look(q, k, plain, layout, groups, run.reduction.spread)
    rows.x = linear(block.attn.proj, mixed.flatten(2), plus=x)
    return None if "hidden" in needs else plain if "keys" in needs else rotated, received


def _in_pieces(run: LayerRun, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a function makes of rows, `mlp_rows` at a time."""
    if not run.mlp_rows or len(x) <= run.mlp_rows:
        return function(x)
    return torch.cat([function(piece) for piece in x.split(run.mlp_rows)])


def _transform(run: LayerRun, layer: int, rows: _LayerRows) -> None:
    """The second half of a layer: the MLP, which works on each row alone."""
    block, kind = run.visual.blocks[layer], layers_of(run.visual)
    active = run.reduction.active(layer)
    x = rows.x if active is None else rows.x[active]
    run.computed[layer] += len(x)
    x = _in_pieces(run, lambda piece: mlp_half(kind, block, piece), x)
    rows.x = x if active is None else rows.x.index_copy(0, active, x)


def mlp_half(kind: Layers, block, x: torch.Tensor) -> torch.Tensor:
    """Norm, MLP and residual of a layer on rows `[R, 4, hidden]`."""
    return kind.mlp(block.mlp, kind.norm(block.norm2, x), x)
