"""The layers of a vision tower on rows of a video, with a model's weights, rounded as in Hugging Face's code.

`VisionBlock` is one layer, in plain PyTorch and by the kernels of a GPU. What differs between families is in families.py, what
happens between layers in reductions.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from evoprune.backend import devices
from evoprune.backend.attention import varlen_kernel
from evoprune.backend.cpu.linear import linear
from evoprune.backend.devices import Timer
from evoprune.backend.layers import give_up, joined, kernels
from evoprune.methods.plans import TowerShape
from evoprune.methods.ranking import unit_features
from evoprune.methods.types import arange_on
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
    y, x = torch.meshgrid(arange_on(geo.height, geo.device), arange_on(geo.width, geo.device), indexing="ij")
    dy, dx = torch.meshgrid(arange_on(merge, geo.device), arange_on(merge, geo.device), indexing="ij")
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


def in_pieces(function: Callable[..., Any], piece: int, *rows: torch.Tensor) -> Any:
    """Return what a function makes of `rows`, tensors of equally many entries, of which it gets `piece` at a time.

    It returns a tensor, or several, of as many entries. This bounds the memory of what is made on the way.
    """
    if len(rows[0]) <= piece:
        return function(*rows)
    made: list[torch.Tensor] = []
    done = 0
    several = False
    for parts in zip(*(x.split(piece) for x in rows), strict=True):
        values = function(*parts)
        several = isinstance(values, tuple)
        values = values if several else (values,)
        if not made:
            made = [value.new_empty(len(rows[0]), *value.shape[1:]) for value in values]
        for whole, value in zip(made, values, strict=True):
            whole[done : done + len(value)] = value
        done += len(parts[0])
    return tuple(made) if several else made[0]


# Keys and values `[K, 4, heads, d]` that a layer attends to, from its number and those of its own rows: K is R, or more where
# something before the video is visible, too.
Visible = Callable[[int, torch.Tensor, torch.Tensor, TokenLayout], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class LayerRun:
    """What layers need beside rows and layout."""

    visual: torch.nn.Module
    timer: Timer  # of pruning
    computed: list[int]  # rows of each of the tower's layers so far, to which those of these layers are added
    piece: int  # rows that go through a product at a time, and about as many that attend: it bounds the memory
    reduction: Reduction = field(default_factory=Reduction)  # what is done with rows between two layers
    visible: Visible | None = None  # adds what is before the video; None where there is nothing
    gathering: Gathering | None = None  # collects the inputs of a selector
    on_layer: Callable[[int], None] = lambda done: None  # called after each layer with the number of finished layers
    # `[R', n, D]`, the DeepStack features of the rows that leave, of the n layers with some so far; None at first
    deepstack: torch.Tensor | None = None

    def finish(self, layer: int, x: torch.Tensor) -> None:
        """Called after a layer with its rows, `[R, 4, hidden]`."""
        inner = vision_sizes(self.visual.config).deepstack_visual_indexes
        if layer in inner:  # it has features for the layer of that number in the language model
            number = inner.index(layer)
            features = in_pieces(
                lambda piece: merge_patches(self.visual, piece, number), self.piece, self.reduction.all_rows(x)
            )
            self.deepstack = torch.cat([self.deepstack, features[:, None]], 1)
        if self.gathering and layer in self.gathering.middle:
            self.gathering.add_states(self.reduction.all_rows(x))
        self.on_layer(layer + 1)


class VisionBlock:
    """A layer of the tower: attention of rows inside their windows or frame pairs, then the MLP of each row; both add to the rows.

    `attend` and `transform` are its halves in plain PyTorch. `by_kernels` computes the same on CUDA in five products and four
    kernels, where these have about 45 operations, for rows that attend to nothing before the video and that nothing reduces or
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
        looks = run.gathering is not None and self.number == run.gathering.layer
        keep_plain = "keys" in needs or (looks and run.gathering.needs_keys)
        q, k, v, *plain = in_pieces(partial(self.queries_keys_values, keep_plain), run.piece, x, *rotation)
        features = plain[0] if keep_plain else None
        if "keys_rotary" in needs:
            with run.timer:
                features = unit_features(k)
        if run.visible:
            k, v = run.visible(self.number, k, v, layout)
        if self.scope not in plans:
            # Before rows merge, the log of every cluster size is 0.
            size_bias = run.reduction.size_bias and layout.reach != "place"
            plans[self.scope] = plan_attention(layout, self.scope, q, size_bias)
        plan = plans[self.scope]
        received = torch.zeros(len(k), dtype=torch.float32, device=k.device) if "attention" in needs else None
        mixed = grouped_attention(q, k, v, plan, received, run.timer, run.piece)
        if looks:
            with run.timer:
                run.gathering.look(q, k, features, layout, plan, run.piece, run.reduction.spread)
        del q, k, v
        compared = None if "hidden" in needs else features, received
        return in_pieces(self.add_attention, run.piece, x, mixed), compared

    def queries_keys_values(
        self, keep_plain: bool, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of rows `[R, 4, hidden]`, `[R, 4, heads, d]` each, the first two rotated.

        With `keep_plain` also the features of keys before rotary, float32 `[R, 4 * d]`.
        """
        qkv = linear(self.weights.attn.qkv, self.kind.norm(self.weights.norm1, x))
        qkv = qkv.view(*x.shape[:2], 3, self.heads, -1)
        q, k = rotate(qkv[:, :, :2], cos, sin).unbind(2)
        if not keep_plain:
            return q, k, qkv[:, :, 2]
        with self.run.timer:
            return q, k, qkv[:, :, 2], unit_features(qkv[:, :, 1])

    def add_attention(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Rows `[R, 4, hidden]` and the output of their attention, `[R, 4, heads, d]`, projected."""
        return linear(self.weights.attn.proj, mixed.flatten(2), plus=x)

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows `[R, 4, hidden]` after the MLP; those that the reduction has set aside stay."""
        active = self.run.reduction.active(self.number)
        rows = x if active is None else x[active]
        self.run.computed[self.number] += len(rows)
        rows = in_pieces(self.mlp, self.run.piece, rows)
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
        return self._add_norm(x, in_pieces(self._mlp_by_kernels, self.run.piece * PATCHES, normed), after)

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
    if not layers:
        return x, layout
    table: Table = rotary(sizes, layout.geometry)
    if run.visible is None and run.gathering is None and type(reduction) is Reduction and can_fuse(x):
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
