"""The tower's layers on one chunk of a video, run on a model's weights, with rows merged between them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.linear import linear
from evoprune.methods.base import Method
from evoprune.pruning.schedule import TowerShape
from evoprune.pruning.score import unit_features
from evoprune.vision import devices
from evoprune.vision.attention import PATCHES, Bucket, Packed, buckets, grouped_attention
from evoprune.vision.gather import Gathering
from evoprune.vision.layout import Geometry, Scope, TokenLayout, attention_groups, geometry
from evoprune.vision.reduce import reduce_rows
from evoprune.vision.rowwise import norm, rotary, rotate
from evoprune.vision.stopwatch import Stopwatch


def tower_shape(visual) -> TowerShape:
    """What schedules need to know of `model.model.visual`."""
    return TowerShape(len(visual.blocks), tuple(visual.config.fullatt_block_indexes))


def tower_geometry(visual, height: int, width: int) -> Geometry:
    """Units and windows of a grid of height x width units, as this tower cuts it."""
    c = visual.config
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


def run_tower(
    visual,
    tower: TowerShape,
    patches: torch.Tensor,
    layout: TokenLayout,
    plan: list[tuple[int, ...]],
    method: Method,
    watch: Stopwatch,
    wrong: list[torch.Tensor],
    last: torch.Tensor | None,
    past: Past,
    gathering: Gathering | None = None,
) -> tuple[torch.Tensor, TokenLayout]:
    """All layers on one chunk; `plan[layer][block]` rows are left after each.

    Args:
        patches: `[R, 4, 1176]`, of the rows of `layout`.
        watch: measures what pruning takes.
        wrong: gets what `reduce_rows` could not check at once.
        last: from `Chunk.layout`, None without references and where no chunk follows.
        past: gets what later chunks will see.
        gathering: gets what the method wants to know after the encoder.

    Returns:
        Rows `[R, 4, hidden]` in window order, and the layout they ended in.
    """
    geo = layout.geometry
    weight = visual.patch_embed.proj.weight.flatten(1)
    if not layout.rows:  # nothing new in any grid
        return weight.new_empty(0, PATCHES, len(weight)), layout
    x = F.linear(patches, weight)
    table = rotary(visual.config, geo)
    cos, sin = (t[layout.place][:, :, None, None] for t in table)
    size_bias, heads = method.size_bias, visual.config.num_heads
    groups: dict[Scope, list[Bucket] | Packed] = {}
    rows, before, past.seen = layout.per_block, past.seen, None if last is None else []
    for layer, block in enumerate(visual.blocks):
        scope = tower.scope(layer)
        if scope not in groups:
            groups[scope] = (
                Packed(attention_groups(layout, scope, exact=False), layout.rows)
                if devices.static_shapes(x.device)
                else buckets(attention_groups(layout, scope))
            )
        qkv = linear(block.attn.qkv, norm(x, block.norm1.weight)).view(*x.shape[:2], 3, heads, -1)
        q, k = rotate(qkv[:, :, :2], cos, sin).unbind(2)
        v = qkv[:, :, 2]
        if before or last is not None:
            seen = torch.stack([k, v], 1)
            if before:
                seen, before[layer] = torch.cat([seen, before[layer]]), None
                if layout.reach == "clip":
                    k, v = seen.unbind(1)
        if last is not None:
            # Of the row that stands for a reference by now: it may have been merged.
            stays = len(x) + torch.arange(geo.units) if before else 0
            past.seen.append(seen[torch.where(last < 0, stays, layout.owner[last])])
        # Log of one is zero: no bias before anything was merged.
        bias = size_bias and layout.reach != "place"
        reduces = plan[layer] != rows
        attention = torch.zeros(len(k)) if reduces and "attention" in method.needs else None
        mixed = grouped_attention(q, k, v, groups[scope], bias, attention, watch)
        if gathering and layer == gathering.layer:
            with watch:
                gathering.look(q, k, qkv[:, :, 1], layout, groups[scope], bias)
        x = linear(block.attn.proj, mixed.flatten(2), plus=x)
        hidden = norm(x, block.norm2.weight)
        hidden = linear(block.mlp.up_proj, hidden, times=linear(block.mlp.gate_proj, hidden, silu=True))
        x = linear(block.mlp.down_proj, hidden, plus=x)
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
    return x, layout
