"""The tower's layers, or some of them, on rows of a video: run on a model's weights, with rows merged between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.methods.base import Method
from evoprune.model.config import vision_sizes
from evoprune.model.linear import linear
from evoprune.pruning.schedule import TowerShape
from evoprune.pruning.score import unit_features
from evoprune.vision import devices
from evoprune.vision.attention import Bucket, Packed, buckets, grouped_attention
from evoprune.vision.families import Family, family
from evoprune.vision.gather import Gathering
from evoprune.vision.layout import Geometry, Scope, TokenLayout, attention_groups, geometry
from evoprune.vision.reduce import reduce_rows
from evoprune.vision.rowwise import rotary, rotate
from evoprune.vision.stopwatch import Stopwatch


def tower_shape(visual) -> TowerShape:
    """What schedules need to know of `model.model.visual`."""
    return TowerShape(len(visual.blocks), vision_sizes(visual.config).fullatt_block_indexes)


def tower_geometry(visual, height: int, width: int) -> Geometry:
    """Units and windows of a grid of height x width units, as this tower cuts it."""
    c = vision_sizes(visual.config)
    side = c.window_size // c.patch_size // c.spatial_merge_size
    return geometry(height, width, side, str(visual.patch_embed.proj.weight.device))


@dataclass
class Past:
    """What the grids of earlier chunks leave for the next one, so much a place and layer, however long the video is.

    Attributes:
        row: int64 `[P]`, which of all rows stands for the reference of each place.
        seen: of each layer, keys and values of that row as they were there, `[P, 2, 4, heads, d]`.
    """

    row: torch.Tensor | None = None
    seen: list[torch.Tensor] | None = None


def embed(visual, patches: torch.Tensor) -> torch.Tensor:
    """Rows `[R, 4, hidden]` as the first layer takes them, of patches `[R, 4, 1176]`."""
    return F.linear(patches, visual.patch_embed.proj.weight.flatten(1))


def second_half(kind: Family, block, x: torch.Tensor) -> torch.Tensor:
    """Of a layer: what looks at no other row; `[R, 4, hidden]`."""
    return kind.mlp(block.mlp, kind.norm(block.norm2, x), x)


def merged_patches(visual, x: torch.Tensor) -> torch.Tensor:
    """Tokens `[R, D]` as the language model reads them, of the last layer's rows `[R, 4, hidden]`."""
    return visual.merger.mlp(family(visual).norm(visual.merger.ln_q, x).flatten(1))


def run_layers(
    visual,
    tower: TowerShape,
    layers: range,
    x: torch.Tensor,
    layout: TokenLayout,
    plan: Sequence[tuple[int, ...]] | None,
    method: Method,
    watch: Stopwatch,
    wrong: list[torch.Tensor],
    last: torch.Tensor | None = None,
    past: Past | None = None,
    gathering: Gathering | None = None,
    at_once: int | None = None,
    on_layer: Callable[[int], None] = lambda done: None,
) -> tuple[torch.Tensor, TokenLayout]:
    """Some neighbouring layers on the rows of a chunk; `plan[layer][block]` rows are left after each, none go without a plan.

    Args:
        x: `[R, 4, hidden]`, the rows of `layout`.
        watch: measures what pruning takes.
        wrong: gets what `reduce_rows` could not check at once.
        last: from `Chunk.layout`, None without references and where no chunk follows.
        past: has what the rows of earlier chunks left in these layers, and gets what later chunks will see.
        gathering: gets what the method wants to know after the encoder.
        at_once: how many rows go through an MLP together, the widest part; default: all.
        on_layer: told after each layer how many of the tower's are done.

    Returns:
        Rows `[R, 4, hidden]` in window order, and the layout they ended in.
    """
    geo = layout.geometry
    if not layout.rows:  # nothing new in any grid
        return x, layout
    past = past or Past()
    sizes, kind = vision_sizes(visual.config), family(visual)
    table = rotary(sizes, geo)
    cos, sin = (t[layout.place][:, :, None, None] for t in table)
    size_bias, heads = method.size_bias, sizes.num_heads
    groups: dict[Scope, list[Bucket] | Packed] = {}
    rows, before, past.seen = layout.per_block, past.seen, None if last is None else []
    for step, layer in enumerate(layers):
        block, scope = visual.blocks[layer], tower.scope(layer)
        if scope not in groups:
            groups[scope] = (
                Packed(attention_groups(layout, scope, exact=False), layout.rows)
                if devices.static_shapes(x.device)
                else buckets(attention_groups(layout, scope))
            )
        qkv = linear(block.attn.qkv, kind.norm(block.norm1, x)).view(*x.shape[:2], 3, heads, -1)
        q, k = rotate(qkv[:, :, :2], cos, sin).unbind(2)
        v = qkv[:, :, 2]
        if before or last is not None:
            seen = torch.stack([k, v], 1)
            if before:
                seen, before[step] = torch.cat([seen, before[step]]), None
                if layout.reach == "clip":
                    k, v = seen.unbind(1)
        if last is not None:
            # Of the row that stands for a reference by now: it may have been merged.
            stays = len(x) + torch.arange(geo.units) if before else 0
            past.seen.append(seen[torch.where(last < 0, stays, layout.owner[last])])
        # Log of one is zero: no bias before anything was merged.
        bias = size_bias and layout.reach != "place"
        reduces = plan is not None and plan[layer] != rows
        attention = torch.zeros(len(k)) if reduces and "attention" in method.needs else None
        mixed = grouped_attention(q, k, v, groups[scope], bias, attention, watch)
        if gathering and layer == gathering.layer:
            with watch:
                gathering.look(q, k, qkv[:, :, 1], layout, groups[scope], bias)
        x = linear(block.attn.proj, mixed.flatten(2), plus=x)
        parts = x.split(at_once) if at_once else [x]
        x = second_half(kind, block, x) if len(parts) == 1 else torch.cat([second_half(kind, block, p) for p in parts])
        if reduces:
            with watch:
                features = (
                    x.flatten(1).float() if "hidden" in method.needs
                    else unit_features(qkv[:, :, 1] if "keys" in method.needs else k[: len(x)])
                )  # fmt: skip
                attention = None if attention is None else attention[: len(x)]
                scope = method.scope(tower, layer)
                x, layout, failed = reduce_rows(x, layout, scope, plan[layer], features, attention, method)
                cos, sin = (t[layout.place][:, :, None, None] for t in table)
                groups, rows = {}, plan[layer]
                wrong += [] if failed is None else [failed]
        on_layer(layer + 1)
    return x, layout
