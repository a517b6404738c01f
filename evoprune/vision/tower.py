"""The layers of a vision tower on rows of a video, with a model's weights, rounded as in Hugging Face's code.

`VisionBlock` is one layer, in plain PyTorch and by the kernels of a GPU. What differs between families is in families.py, what
happens between layers in reductions.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F

from evoprune.backend import devices
from evoprune.backend.attention import varlen_kernel
from evoprune.backend.devices import Timer
from evoprune.backend.layers import give_up, joined, kernels
from evoprune.cpu.linear import linear
from evoprune.methods.plans import TowerShape
from evoprune.methods.types import ascending
from evoprune.model.config import PATCHES, VisionConfig, vision_sizes
from evoprune.vision.attention import AttentionPlan, Packed, grouped_attention, plan_attention
from evoprune.vision.families import EPS, merge_patches, tower_layers
from evoprune.vision.layout import Geometry, Scope, TokenLayout, geometry
from evoprune.vision.reductions import Compared, Gathering, Reduction

Table = tuple[torch.Tensor, torch.Tensor]  # cosines and sines


@lru_cache(maxsize=16)
def rotary(sizes: VisionConfig, geo: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary embedding, float32 `[units, 4, 1, 1, head_dim]` each, by raster place.

    The first half of the sines is negated. One half of the angles depends on the patch's y, the other half on its x.
    """
    merge = sizes.spatial_merge_size
    quarter = sizes.hidden_size // sizes.num_heads // 4
    speed = 10000.0 ** (torch.arange(quarter, dtype=torch.float32, device=geo.device) / -quarter)
    y, x = torch.meshgrid(ascending(geo.height, geo.device), ascending(geo.width, geo.device), indexing="ij")
    dy, dx = torch.meshgrid(ascending(merge, geo.device), ascending(merge, geo.device), indexing="ij")
    at = torch.stack([(y.flatten()[:, None] * merge + dy.flatten()), (x.flatten()[:, None] * merge + dx.flatten())], -1)
    angle = (at[..., None].float() * speed).flatten(2)[:, :, None, None]
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` (`[R, 4, 2, heads, d]`) turned in float32 by `cos` and `sin` (float32 `[R, 4, 1, 1, d]`)."""
    wide = x.float()
    rolled = wide.roll(x.shape[-1] // 2, -1)
    return (wide * cos).addcmul_(rolled, sin).to(x.dtype)


def tower_shape(visual, device: torch.device | None = None) -> TowerShape:
    """Return the properties of the tower `visual` (`model.model.visual`) that plans depend on.

    `device`: where it will run; None for the device of its weights.
    """
    sizes = vision_sizes(visual.config)
    window = sizes.window_size // sizes.patch_size // sizes.spatial_merge_size
    launch_bound = devices.launch_bound_units(device or visual.patch_embed.proj.weight.device)
    return TowerShape(len(visual.blocks), sizes.fullatt_block_indexes, window, launch_bound)


def tower_geometry(visual, height: int, width: int) -> Geometry:
    """Return the windows into which this tower divides a frame pair of height x width units."""
    return geometry(height, width, tower_shape(visual).window, str(visual.patch_embed.proj.weight.device))


class CarriedKeys:
    """The latest encoded row of each of P places: its index among all rows, and its keys and values in each layer.

    At first these are the keys and values of the segment before (`earlier`), if there is one, whose rows have no index: -1.
    """

    def __init__(self, earlier: dict[int, torch.Tensor] | None = None):
        self.keys_values = dict(earlier or {})  # by layer: [P, 2, 4, heads, d]
        self._follows = False
        self._number: torch.Tensor | None = None  # int64 [P]
        for places in list(self.keys_values.values())[:1]:
            self._number = places.new_full((len(places),), -1, dtype=torch.int64)

    def begin(self, follows: bool) -> None:
        """Starts a chunk; `follows`: whether a later one, or another segment, does."""
        self._follows = follows

    def seen_by(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[R or R + P, 4, heads, d]`: a chunk's in `layer`, and the references'; keeps those of later chunks."""
        earlier = self.keys_values.pop(layer, None)
        if earlier is None and not self._follows:
            return k, v
        both = torch.stack([k, v], 1)
        if earlier is not None:
            both = torch.cat([both, earlier])
        if self._follows:
            self.keys_values[layer] = both[layout.unit_to_row[-layout.geometry.units :]]
        return both.unbind(1) if earlier is not None and layout.reach == "clip" else (k, v)

    def among_all(self, layout: TokenLayout, count: int) -> torch.Tensor:
        """`unit_to_row` of the chunk's layout as indices among all rows, of which so many come before the chunk's."""
        unit_to_row = layout.unit_to_row + count
        if self._number is not None:
            number = torch.cat([ascending(layout.rows, unit_to_row.device) + count, self._number])
            unit_to_row = number[layout.unit_to_row]
        if self._follows:
            self._number = unit_to_row[-layout.geometry.units :]
        return unit_to_row


def in_pieces(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, piece: int | None) -> torch.Tensor:
    """Return what a function makes of `x`, of which it gets `piece` entries at a time; all where that is None."""
    if not piece or len(x) <= piece:
        return function(x)
    return torch.cat([function(part) for part in x.split(piece)])


@dataclass
class LayerRun:
    """What layers need beside rows and layout."""

    visual: torch.nn.Module
    timer: Timer  # of pruning
    computed: list[int]  # rows of each of the tower's layers so far, to which those of these layers are added
    reduction: Reduction = field(default_factory=Reduction)  # what is done with rows between two layers
    carried: CarriedKeys | None = None  # rows of earlier chunks that this chunk attends to; None without reuse
    gathering: Gathering | None = None  # collects the inputs of a selector
    piece: int | None = None  # rows that go through an MLP at a time, which bounds the memory; None for all
    on_layer: Callable[[int], None] = lambda done: None  # called after each layer with the number of finished layers
    # `[R', n, D]`, the DeepStack features of the rows that leave, of the n layers with some so far; None at first
    deepstack: torch.Tensor | None = None

    def finish(self, layer: int, x: torch.Tensor) -> None:
        """Called after a layer with its rows, `[R, 4, hidden]`."""
        inner = vision_sizes(self.visual.config).deepstack_visual_indexes
        if layer in inner:  # it has features for the layer of that number in the language model
            number = inner.index(layer)
            features = in_pieces(
                lambda piece: merge_patches(self.visual, piece, number), self.reduction.all_rows(x), self.piece
            )
            self.deepstack = torch.cat([self.deepstack, features[:, None]], 1)
        if self.gathering and layer in self.gathering.middle:
            self.gathering.add_states(self.reduction.all_rows(x))
        self.on_layer(layer + 1)


class VisionBlock:
    """A layer of the tower: attention of rows inside their windows or frame pairs, then the MLP of each row; both add to the rows.

    `attend` and `transform` are its halves in plain PyTorch. `by_kernels` computes the same on CUDA in five products and four
    kernels, where these have about 45 operations, for rows that attend to none of an earlier chunk and that nothing reduces or
    looks at.
    """

    def __init__(self, run: LayerRun, number: int):
        self.run, self.number, self.weights = run, number, run.visual.blocks[number]
        self.kind = tower_layers(run.visual)
        self.heads = vision_sizes(run.visual.config).num_heads
        self.scope: Scope = tower_shape(run.visual).scope(number)

    def attend(
        self,
        x: torch.Tensor,
        layout: TokenLayout,
        rotation: list[torch.Tensor],
        plans: dict[Scope, AttentionPlan],
        needs: frozenset[str],
    ) -> tuple[torch.Tensor, Compared]:
        """Return the rows `[R, 4, hidden]` after attention, and what `Reduction.after` compares, as far as it `needs` it.

        `rotation`: cosines and sines of each row, `[R, 4, 1, 1, d]`. `plans`: of the layout, once they are made.
        """
        run = self.run
        weights = self.weights
        qkv = linear(weights.attn.qkv, self.kind.norm(weights.norm1, x))
        qkv = qkv.view(*x.shape[:2], 3, self.heads, -1)
        q, k = rotate(qkv[:, :, :2], *rotation).unbind(2)
        v = qkv[:, :, 2]
        plain = qkv[:, :, 1]
        rotated = k
        if run.carried:
            k, v = run.carried.seen_by(self.number, k, v, layout)
        if self.scope not in plans:
            # Before rows merge, the log of every cluster size is 0.
            size_bias = run.reduction.size_bias and layout.reach != "place"
            plans[self.scope] = plan_attention(layout, self.scope, q, size_bias)
        plan = plans[self.scope]
        received = torch.zeros(len(k), dtype=torch.float32, device=k.device) if "attention" in needs else None
        mixed = grouped_attention(q, k, v, plan, received, run.timer)
        if run.gathering and self.number == run.gathering.layer:
            with run.timer:
                run.gathering.look(q, k, plain, layout, plan, run.reduction.spread)
        x = linear(weights.attn.proj, mixed.flatten(2), plus=x)
        return x, (None if "hidden" in needs else plain if "keys" in needs else rotated, received)

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows `[R, 4, hidden]` after the MLP; those that the reduction has set aside stay."""
        active = self.run.reduction.active(self.number)
        rows = x if active is None else x[active]
        self.run.computed[self.number] += len(rows)
        rows = in_pieces(self.mlp, rows, self.run.piece)
        return rows if active is None else x.index_copy(0, active, rows)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Norm, MLP and residual of rows `[R, 4, hidden]`."""
        return self.kind.mlp(self.weights.mlp, self.kind.norm(self.weights.norm2, x), x)

    def by_kernels(
        self,
        x: torch.Tensor,
        normed: torch.Tensor | None,
        after: torch.nn.Module | None,
        plan: Packed,
        layout: TokenLayout,
        table: Table,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`x` (`[R * 4, hidden]`) after the layer, and that after the norm `after`; `normed`: `x` after this layer's first norm."""
        weights = self.weights
        if normed is None:
            x, normed = self._add_norm(x, None, weights.norm1)
        qkv = weights.attn.qkv(normed).view(layout.rows, PATCHES, -1)
        dim = x.shape[1] // self.heads
        q, k, v = kernels(x.device).rotate_into_groups(qkv, *table, layout.place, self.heads, *plan.keys)
        mixed = plan.attend(q, k, v, scale=dim**-0.5)
        x, normed = self._add_norm(x, weights.attn.proj(mixed[..., :dim].flatten(1)), weights.norm2)
        piece = self.run.piece and self.run.piece * PATCHES
        return self._add_norm(x, in_pieces(self._mlp_by_kernels, normed, piece), after)

    def _add_norm(
        self, x: torch.Tensor, plus: torch.Tensor | None, norm: torch.nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum, and the sum after `norm`."""
        if norm is None:
            return x + plus, None
        if self.kind.rms:
            return kernels(x.device).add_norm(x, plus, norm.weight, EPS)
        x = x if plus is None else x + plus
        return x, self.kind.norm(norm, x)

    def _mlp_by_kernels(self, x: torch.Tensor) -> torch.Tensor:
        """Return an MLP without norm and residual, `[rows, hidden]`."""
        mlp = self.weights.mlp
        if parameters := joined(mlp):
            hidden = kernels(x.device).silu_times(F.linear(x, *parameters))
            return F.linear(hidden, mlp.wide_down, mlp.down_proj.bias)
        return self.kind.mlp(mlp, x, None)


def run_layers(run: LayerRun, layers: range, x: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, TokenLayout]:
    """Rows `[R, 4, hidden]`, in window order, after neighbouring layers of the tower; and their layout, for there may be fewer."""
    sizes = vision_sizes(run.visual.config)
    reduction = run.reduction
    if run.deepstack is None:
        run.deepstack = x.new_empty(len(x), 0, sizes.out_hidden_size)
    if not layers or not layout.rows:  # all units are reused
        return x, layout
    table: Table = rotary(sizes, layout.geometry)
    if run.carried is None and run.gathering is None and type(reduction) is Reduction and can_fuse(x):
        x, layers = _run_by_kernels(run, layers, x, layout, table)
        if not layers:
            return x, layout
    rotation = [of_place[layout.place] for of_place in table]
    plans = {}
    reduction.begin(x)
    for layer in layers:
        block = VisionBlock(run, layer)
        acts = reduction.acts(layer, layout)
        x, compared = block.attend(x, layout, rotation, plans, reduction.needs if acts else frozenset())
        x = block.transform(x)
        if acts:
            with run.timer:
                before = layout
                x, layout = reduction.after(layer, block.scope, x, before, compared)
                if layout is not before:
                    run.deepstack = reduction.joined(run.deepstack, before, layout)
                    rotation = [of_place[layout.place] for of_place in table]
                    plans = {}
        run.finish(layer, x)
    return x, layout


def can_fuse(x: torch.Tensor) -> bool:
    """Return whether there are kernels for rows on this device, in this dtype."""
    return varlen_kernel(x.device, x.dtype) is not None and kernels(x.device) is not None


def _run_by_kernels(
    run: LayerRun, layers: range, x: torch.Tensor, layout: TokenLayout, table: Table
) -> tuple[torch.Tensor, range]:
    """Rows `[R, 4, hidden]` after `layers`, and the layers that are left: none, unless a kernel fails."""
    shape = x.shape
    plans = {}
    normed = None
    x = x.flatten(0, 1)
    for layer in layers:
        try:
            block = VisionBlock(run, layer)
            if block.scope not in plans:
                plans[block.scope] = plan_attention(layout, block.scope, x, layout.reach != "place")
            after = run.visual.blocks[layer + 1].norm1 if layer + 1 in layers else None
            outputs = block.by_kernels(x, normed, after, plans[block.scope], layout, table)
        except Exception as problem:
            give_up(problem)
            return x.view(shape), range(layer, layers.stop)
        x, normed = outputs
        run.computed[layer] += layout.rows
        run.finish(layer, x.view(shape))
    return x.view(shape), range(0)
