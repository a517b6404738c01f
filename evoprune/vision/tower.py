"""The layers of a vision tower on rows of a video, with a model's weights, rounded as in Hugging Face's code.

`run_layer` is one layer in plain PyTorch, `run_by_kernels` several by the kernels of a GPU. What differs between families is in
families.py, what happens after layers in hooks.py.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from evoprune.backend import Timer, give_up, joined, kernels_for, linear, varlen_kernel
from evoprune.methods import TowerShape, arange_on
from evoprune.model import PATCHES, VisionConfig, vision_sizes
from evoprune.vision.attention import Groups, PackedGroups, attention_groups, attention_received, grouped_attention
from evoprune.vision.families import EPS, Layers, tower_layers
from evoprune.vision.hooks import PRECISE
from evoprune.vision.layout import Geometry, Scope, geometry
from evoprune.vision.rows import Rows

Table = tuple[torch.Tensor, torch.Tensor]  # cosines and sines


@lru_cache(maxsize=16)
def rotary(sizes: VisionConfig, geo: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the rotary embedding, float32 `[units, 4, 1, 1, head_dim]` each, by raster place.

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
    """Return `x` (`[R, 4, 2, heads, d]`) turned in float32 by `cos` and `sin` (float32 `[R, 4, 1, 1, d]`)."""
    wide = x.float()
    rolled = wide.roll(x.shape[-1] // 2, -1)
    return (wide * cos).addcmul_(rolled, sin).to(x.dtype)


def tower_shape(visual) -> TowerShape:
    """Return the properties of the tower `visual` (`model.model.visual`) that plans depend on."""
    device = visual.patch_embed.proj.weight.device
    return TowerShape.of(vision_sizes(visual.config), str(device))


def tower_geometry(visual, height: int, width: int) -> Geometry:
    """Return the windows into which this tower divides a frame pair of height x width units."""
    return geometry(height, width, tower_shape(visual).window, str(visual.patch_embed.proj.weight.device))


def in_pieces(
    function: Callable[..., torch.Tensor], piece: int, *rows: torch.Tensor, into: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what a function makes of `rows`, tensors of equally many entries, of which it gets `piece` at a time.

    It returns a tensor of as many entries. This bounds the memory of what is made on the way.

    `into`: where to write the result if there are several pieces, perhaps one of `rows`: new memory takes time.
    """
    if len(rows[0]) <= piece:
        return function(*rows)
    done = 0
    for parts in zip(*(x.split(piece) for x in rows), strict=True):
        values = function(*parts)
        if into is None:
            into = values.new_empty(len(rows[0]), *values.shape[1:])
        into[done : done + len(values)] = values
        done += len(values)
    return into


# Keys and values `[K, 4, heads, d]` that a layer attends to, from its number and those of its own rows: K is R, or more where
# something before the video is visible, too.
Visible = Callable[[int, torch.Tensor, torch.Tensor, Rows], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Layer:
    """A layer of the tower: attention of rows inside their windows or frame pairs, then the MLP of each row; both add to the rows.

    The functions of rows compute each for itself.
    """

    number: int
    weights: torch.nn.Module
    kind: Layers
    heads: int
    scope: Scope

    @classmethod
    def of(cls, visual, number: int) -> "Layer":
        """Return a layer of the tower `visual`."""
        heads = vision_sizes(visual.config).num_heads
        return cls(number, visual.blocks[number], tower_layers(visual), heads, tower_shape(visual).scope(number))

    def queries_keys_values(self, x: torch.Tensor, piece: int) -> torch.Tensor:
        """Return queries, keys and values of rows `[R, 4, hidden]`, `[R, 4, 3, heads, d]`, before rotary."""
        normed = in_pieces(partial(self.kind.norm, self.weights.norm1), piece, x)
        return linear(self.weights.attn.qkv, normed).view(*x.shape[:2], 3, self.heads, -1)

    def add_attention(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Return rows `[R, 4, hidden]` plus the output of their attention, `[R, 4, heads, d]`, projected."""
        return linear(self.weights.attn.proj, mixed.flatten(2), plus=x)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows `[R, 4, hidden]` after norm, MLP and residual."""
        return self.kind.mlp(self.weights.mlp, self.kind.norm(self.weights.norm2, x), x)

    def by_kernels(
        self,
        x: torch.Tensor,
        normed: torch.Tensor | None,
        after: torch.nn.Module | None,
        groups: PackedGroups,
        rows: Rows,
        table: Table,
        piece: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `x` (`[R * 4, hidden]`) after the layer, and that after the norm `after`.

        `normed`: `x` after this layer's first norm; None: it is taken here.

        It takes five products and four kernels, where plain PyTorch has about 45 operations.
        """
        weights = self.weights
        if normed is None:
            x, normed = self._add_norm(x, None, weights.norm1)
        qkv = weights.attn.qkv(normed).view(len(rows), PATCHES, -1)
        dim = x.shape[1] // self.heads
        q, k, v = kernels_for(x.device).rotate_into_groups(qkv, *table, rows.place, self.heads, *groups.keys)
        mixed = groups.attend(q, k, v, scale=dim**-0.5)
        x, normed = self._add_norm(x, weights.attn.proj(mixed[..., :dim].flatten(1)), weights.norm2)
        return self._add_norm(x, in_pieces(self._mlp_by_kernels, piece * PATCHES, normed), after)

    def _add_norm(
        self, x: torch.Tensor, plus: torch.Tensor | None, norm: torch.nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum, and the sum after `norm`."""
        if norm is None:
            return x + plus, None
        if self.kind.rms:
            return kernels_for(x.device).add_norm(x, plus, norm.weight, EPS)
        if plus is not None:
            x = x + plus
        return x, self.kind.norm(norm, x)

    def _mlp_by_kernels(self, x: torch.Tensor) -> torch.Tensor:
        """Return an MLP without norm and residual, `[rows, hidden]`."""
        mlp = self.weights.mlp
        if parameters := joined(mlp):
            hidden = kernels_for(x.device).silu_times(F.linear(x, *parameters))
            return F.linear(hidden, mlp.wide_down, mlp.down_proj.bias)
        return self.kind.mlp(mlp, x, None)


def rotation_of(visual, rows: Rows) -> list[torch.Tensor]:
    """Return the cosines and sines of each row, float32 `[R, 4, 1, 1, d]`."""
    return [of_place[rows.place] for of_place in rotary(vision_sizes(visual.config), rows.geometry)]


def run_layer(
    layer: Layer,
    rows: Rows,
    groups: dict[Scope, Groups],
    rotation: list[torch.Tensor],
    piece: int,
    needs: frozenset[str] = frozenset(),
    timer: Timer | None = None,
    visible: Visible | None = None,
) -> dict[str, torch.Tensor]:
    """Replaces the values of rows by those after a layer. Returns what hooks need of it, as `Hook` describes.

    Args:
        groups: of these rows, once they are made.
        rotation: of these rows, from `rotation_of`.
        piece: rows that go through a product at a time, and about as many that attend: it bounds the memory.
        timer: of what is computed because of `needs`.
        visible: adds what is before the video; None where there is nothing.
    """
    timer = timer or nullcontext()
    seen = {}
    qkv = layer.queries_keys_values(rows.values, piece)
    if "keys" in needs:
        with timer:
            seen["keys"] = unit_features(qkv[:, :, 1])
    q, k = in_pieces(rotate, piece, qkv[:, :, :2], *rotation, into=qkv[:, :, :2]).unbind(2)
    v = qkv[:, :, 2]
    if "keys_rotary" in needs:
        with timer:
            seen["keys_rotary"] = unit_features(k)
    if visible:
        k, v = visible(layer.number, k, v, rows)
    if layer.scope not in groups:
        groups[layer.scope] = attention_groups(rows, layer.scope, q)
    if "attention" in needs:
        seen["attention"] = torch.zeros(len(k), dtype=torch.float32, device=k.device)
    mixed = grouped_attention(q, k, v, groups[layer.scope], seen.get("attention"), timer, piece)
    if PRECISE in needs:
        with timer:
            seen[PRECISE] = attention_received(q, k, groups[layer.scope], piece)
    del qkv, q, k, v
    rows.values = layer.add_attention(rows.values, mixed)
    del mixed
    if rows.active is None:
        rows.values = in_pieces(layer.mlp, piece, rows.values, into=rows.values)
    else:
        rows.values.index_copy_(0, rows.active, in_pieces(layer.mlp, piece, rows.values[rows.active]))
    return seen


def can_fuse(x: torch.Tensor) -> bool:
    """Return whether there are kernels for rows on this device, in this dtype."""
    return varlen_kernel(x.device, x.dtype) is not None and kernels_for(x.device) is not None


def run_by_kernels(visual, layers: range, rows: Rows, piece: int, after: Callable[[int, Rows, int], None]) -> range:
    """Replaces the values of rows by those after layers, which nothing looks at.

    `after` is called after each with the number of finished layers, the rows, and their number.

    Returns the layers that are left: none, unless a kernel fails; all where there are no kernels.
    """
    if not layers or not can_fuse(rows.values):
        return layers
    table: Table = rotary(vision_sizes(visual.config), rows.geometry)
    shape = rows.values.shape
    groups = {}
    x = rows.values.flatten(0, 1)
    normed = None
    for number in layers:
        try:
            layer = Layer.of(visual, number)
            if layer.scope not in groups:
                groups[layer.scope] = attention_groups(rows, layer.scope, x)
            following = None
            if number + 1 in layers:
                following = visual.blocks[number + 1].norm1
            x, normed = layer.by_kernels(x, normed, following, groups[layer.scope], rows, table, piece)
        except Exception as problem:
            give_up(problem)
            return range(number, layers.stop)
        rows.values = x.view(shape)
        after(number + 1, rows, len(rows))
    return range(0)


def unit_features(x: torch.Tensor) -> torch.Tensor:
    """Return float32 `[R, 4 * d]`: keys or queries (`[R, 4, heads, d]`) as the mean over heads, with the four patches joined."""
    return x.float().mean(2).flatten(1)
