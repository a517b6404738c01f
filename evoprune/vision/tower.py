"""Runs vision tower layers on the rows of a video, with the same rounding as the Hugging Face implementation.

`run_layer` runs one layer in plain PyTorch, whereas `run_by_kernels` runs consecutive layers using fused GPU kernels. The
differences between model families are implemented in families.py, and the hooks that run after layers in hooks.py.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F

from evoprune.backend import Attention, Timer, joined, kernels_for, linear
from evoprune.methods import TowerShape, arange_on
from evoprune.model import PATCHES, VisionConfig
from evoprune.vision.attention import (
    PRECISE_ATTENTION,
    Groups,
    PackedGroups,
    attention_groups,
    attention_received,
    grouped_attention,
)
from evoprune.vision.families import EPS, Layers, tower_layers
from evoprune.vision.layout import Geometry, Scope
from evoprune.vision.rows import Rows

Table = tuple[torch.Tensor, torch.Tensor]  # the rotary cosines and sines


@lru_cache(maxsize=16)
def rotary(sizes: VisionConfig, geo: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotary embedding cosines and sines, each float32 `[units, 4, 1, 1, head_dim]`, in raster order.

    The first half of the sines is negated, as required by `rotate`. Half of the angles depend on the patch's y coordinate, and the
    other half on its x coordinate.
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
    """Apply rotary embeddings to `x` (`[R, 4, 2, heads, d]`) in float32. `cos` and `sin` are `[R, 4, 1, 1, d]`."""
    wide = x.float()
    rolled = wide.roll(x.shape[-1] // 2, -1)
    return (wide * cos).addcmul_(rolled, sin).to(x.dtype)


def in_pieces(
    function: Callable[..., torch.Tensor], piece: int, *rows: torch.Tensor, into: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply a function to `piece` rows at a time to limit temporary memory, and return the concatenated results.

    Args:
        function: A function that returns one row for each row of its arguments.
        piece: The number of rows per call.
        rows: The function's arguments, which must all have the same number of rows.
        into: A tensor that may be overwritten with the result to save an allocation. It may be one of `rows`, and is used only if
            more than one call is needed.
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


# A function that returns the keys and values visible to the rows of a layer, `[K, 4, heads, d]` each. Its arguments are the layer
# index, the keys and values of the R rows, and the rows. K is greater than R if rows from the previous segment are visible.
Visible = Callable[[int, torch.Tensor, torch.Tensor, Rows], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Layer:
    """A vision tower layer: attention within windows or frame pairs, followed by an MLP, both with residual connections.

    `by_kernels` computes the whole layer, including the attention between rows. All other methods process each row independently.
    """

    number: int
    weights: torch.nn.Module
    kind: Layers
    heads: int
    scope: Scope

    @classmethod
    def of(cls, visual, number: int) -> "Layer":
        """Return the layer at index `number` in the vision tower `visual`."""
        heads = VisionConfig.of(visual.config).num_heads
        return cls(
            number, visual.blocks[number], tower_layers(visual), heads, TowerShape.of_tower(visual).scope(number)
        )

    def queries_keys_values(self, x: torch.Tensor, piece: int) -> torch.Tensor:
        """Compute the queries, keys, and values of the rows `x` (`[R, 4, hidden]`) before rotary. Returns `[R, 4, 3, heads, d]`."""
        normed = in_pieces(partial(self.kind.norm, self.weights.norm1), piece, x)
        return linear(self.weights.attn.qkv, normed).view(*x.shape[:2], 3, self.heads, -1)

    def add_attention(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Project the attention output `mixed` (`[R, 4, heads, d]`) and add it to the rows `x` (`[R, 4, hidden]`)."""
        return linear(self.weights.attn.proj, mixed.flatten(2), plus=x)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the norm and the MLP to the rows `x` (`[R, 4, hidden]`), and add the result to `x`."""
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
        """Run the layer as five matrix products and four fused kernels instead of about 45 plain PyTorch operations.

        Args:
            x: `[R * 4, hidden]`, the patches of the rows.
            normed: `x` after this layer's first norm, or None to compute it here.
            after: A norm to apply to the output, or None.
            groups: The row groups for this layer's scope.
            table: The result of `rotary`.
            piece: The number of rows to process at a time in the MLP.

        Returns:
            The output, `[R * 4, hidden]`, and the output after the norm `after` (None if there is no such norm).
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
        """Return the sum of `x` and `plus`, and the same sum after `norm` (None if `norm` is None)."""
        if norm is None:
            return x + plus, None
        if self.kind.rms:
            return kernels_for(x.device).add_norm(x, plus, norm.weight, EPS)
        if plus is not None:
            x = x + plus
        return x, self.kind.norm(norm, x)

    def _mlp_by_kernels(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the MLP without its norm or residual connection."""
        mlp = self.weights.mlp
        if parameters := joined(mlp):
            hidden = kernels_for(x.device).silu_times(F.linear(x, *parameters))
            return F.linear(hidden, mlp.wide_down, mlp.down_proj.bias)
        return self.kind.mlp(mlp, x, None)


def rotation_of(visual, rows: Rows) -> list[torch.Tensor]:
    """Return the rotary cosines and sines for each row, each float32 `[R, 4, 1, 1, d]`."""
    return [of_place[rows.place] for of_place in rotary(VisionConfig.of(visual.config), rows.geometry)]


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
    """Run a vision tower layer, replacing the values of `rows` with the layer's output.

    Args:
        groups: The attention groups of these rows, by scope. Groups for a missing scope are added in place.
        rotation: The result of `rotation_of` for these rows.
        piece: The number of rows per matrix product, which limits memory usage. Attention also processes about this many rows at a
            time.
        needs: The names of the data required by hooks (see `Hook.needs`).
        timer: Measures the time spent computing the data for hooks.
        visible: A function that adds the previous segment's keys and values, or None if there is no previous segment.

    Returns:
        The data requested by `needs`, by name (see `Hook`).
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
    if PRECISE_ATTENTION in needs:
        with timer:
            seen[PRECISE_ATTENTION] = attention_received(q, k, groups[layer.scope], piece)
    del qkv, q, k, v
    rows.values = layer.add_attention(rows.values, mixed)
    del mixed
    if rows.active is None:
        rows.values = in_pieces(layer.mlp, piece, rows.values, into=rows.values)
    else:
        rows.values.index_copy_(0, rows.active, in_pieces(layer.mlp, piece, rows.values[rows.active]))
    return seen


def fused_kernels(x: torch.Tensor) -> ModuleType | None:
    """Return the fused kernel module, or None if the kernels don't support the device or dtype of `x`."""
    return None if Attention.of(x).varlen_kernel is None else kernels_for(x.device)


def run_by_kernels(visual, layers: range, rows: Rows, piece: int, after: Callable[[int, Rows, int], None]) -> range:
    """Run layers without hooks using fused GPU kernels, replacing the values of `rows` with the last layer's output.

    Args:
        piece: The number of rows to process at a time in an MLP.
        after: Called after each layer with the number of finished layers, the rows, and the number of rows.

    Returns:
        The range of layers still to run, which is normally empty. If a kernel fails, the range starts with the failed layer. If no
        kernels are available, it contains all layers.
    """
    kernels = fused_kernels(rows.values)
    if not layers or kernels is None:
        return layers
    table: Table = rotary(VisionConfig.of(visual.config), rows.geometry)
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
            kernels.give_up(problem)
            return range(number, layers.stop)
        rows.values = x.view(shape)
        after(number + 1, rows, len(rows))
    return range(0)


def unit_features(x: torch.Tensor) -> torch.Tensor:
    """Average keys or queries (`[R, 4, heads, d]`) over heads and concatenate the four patches. Returns float32 `[R, 4 * d]`."""
    return x.float().mean(2).flatten(1)
