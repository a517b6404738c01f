"""The vision tower, run on a model's weights, with rows merged between its layers.

Video comes in as patches, grid after grid, and is encoded in chunks of whole grids: no layer of the tower looks across grids, so
memory stays constant and the result does not depend on the chunk size. Without pruning the output is Hugging Face's, up to
rounding.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from evoprune.clock import now
from evoprune.linear import linear
from evoprune.methods.base import Candidates, Method, Selection, Tokens
from evoprune.pruning.budget import spread
from evoprune.pruning.merge import merge_rows
from evoprune.pruning.schedule import TowerShape, share_by_size
from evoprune.pruning.score import unit_features
from evoprune.vision.attention import PATCHES, Bucket, buckets, grouped_attention
from evoprune.vision.layout import Geometry, Scope, TokenLayout, attention_groups, full_layout, geometry, merged_layout

# Units encoded at a time, at least one grid. 2,048 rows of patches keep matrix products at full speed and what lies between
# them in a CPU's caches (`python -m evoprune.parts`). A GPU wants more at once.
CHUNK_UNITS = 512
GPU_CHUNK_UNITS = 8192


@dataclass(frozen=True)
class Encoded:
    """A video, or several one after another, as the language model will read them.

    Attributes:
        features: `[K, D]`, the tokens.
        kept: int64 `[K]`, the unit at whose place each token sits, Hugging Face's order, ascending.
        rows: `[E, D]`, what the encoder ended with, ordered by place.
        owner: int64 `[N]`, which of `rows` stands for each unit, -1 for none.
        grids: (T, H, W) in units, of each video.
        layers: (layer, rows that entered it, rows that left it), over all of the video.
        prune_seconds: time spent on scores, merging and selection, part of the encoding time.
        flat: whether every grid was one even colour, so that no unit differs from another and what was merged says nothing.
    """

    features: torch.Tensor
    kept: torch.Tensor
    rows: torch.Tensor
    owner: torch.Tensor
    grids: tuple[tuple[int, int, int], ...]
    layers: list[tuple[int, int, int]]
    prune_seconds: float
    flat: bool = False

    @property
    def live_share(self) -> float:
        """Mean over the layers of the rows computed, as a share of all units: what the tower's time follows."""
        return sum(entered for _, entered, _ in self.layers) / len(self.layers) / len(self.owner)

    @property
    def kept_per_grid(self) -> list[int]:
        """Tokens of each grid, video after video."""
        edges = [h * w for t, h, w in self.grids for _ in range(t)]
        grid = torch.arange(len(edges)).repeat_interleave(torch.tensor(edges))
        return torch.bincount(grid[self.kept.cpu()], minlength=len(edges)).tolist()


def joined(videos: list[Encoded]) -> Encoded:
    """Several videos as one: units and rows numbered on from video to video."""
    if len(videos) == 1:
        return videos[0]
    units = [0, *accumulate(len(v.owner) for v in videos)]
    rows = [0, *accumulate(len(v.rows) for v in videos)]
    return Encoded(
        torch.cat([v.features for v in videos]),
        torch.cat([v.kept + first for v, first in zip(videos, units, strict=False)]),
        torch.cat([v.rows for v in videos]),
        torch.cat([torch.where(v.owner >= 0, v.owner + first, -1) for v, first in zip(videos, rows, strict=False)]),
        sum((v.grids for v in videos), ()),
        [
            (layers[0][0], sum(n for _, n, _ in layers), sum(n for _, _, n in layers))
            for layers in zip(*(v.layers for v in videos), strict=True)
        ],
        sum(v.prune_seconds for v in videos),
        all(v.flat for v in videos),
    )


def units_at_a_time(device: torch.device) -> int:
    """How many units are encoded at a time, at least one grid."""
    return CHUNK_UNITS if device.type == "cpu" else GPU_CHUNK_UNITS


def tower_shape(visual) -> TowerShape:
    """What schedules need to know of `model.model.visual`."""
    return TowerShape(len(visual.blocks), tuple(visual.config.fullatt_block_indexes))


def tower_geometry(visual, height: int, width: int) -> Geometry:
    """Units and windows of a grid of height x width units, as this tower cuts it."""
    c = visual.config
    side = c.window_size // c.patch_size // c.spatial_merge_size
    return geometry(height, width, side, str(visual.patch_embed.proj.weight.device))


def in_grids(patches: Iterable[torch.Tensor], rows_per_grid: int, grids: int) -> Iterator[torch.Tensor]:
    """Re-cuts a stream of patch rows into pieces of `grids` whole grids; the last may be shorter."""
    held, size = [], rows_per_grid * grids
    for piece in patches:
        if not len(piece):
            continue
        held.append(piece)
        while (have := sum(map(len, held))) >= size:
            joined = torch.cat(held) if len(held) > 1 else held[0]
            yield joined[:size]
            held = [joined[size:]] if have > size else []  # never an empty piece
    if held:
        yield torch.cat(held)


@torch.inference_mode()
def encode(
    visual,
    patches: Iterable[torch.Tensor],
    grid: tuple[int, int, int],
    method: Method,
    keep: int,
    *,
    seconds_per_grid: float = 1.0,
    seed: int = 0,
    chunk_units: int | None = None,
) -> Encoded:
    """Encodes one video so that about `keep` of its units reach the language model.

    Args:
        visual: the tower's weights, a `qwen.Tower` or a Hugging Face `Qwen2_5_VisionTransformerPretrainedModel`.
        patches: pieces of `[rows, 1176]` in Hugging Face's order that add up to the whole video.
        grid: (T, H, W) in merge units (2x2 patches).
        method: the pruning method.
        keep: K, from 1 to T*H*W. Exactly K tokens come out if the method is `exact`; all T*H*W if it prunes nothing here.
        seconds_per_grid, seed: passed on to the method.
        chunk_units: units to encode at a time, rounded down to whole grids but at least one; default: `units_at_a_time`.
            Bounds the memory.

    Raises:
        ValueError: `patches` do not add up to the grid.
    """
    count, height, width = grid
    tower, weight = tower_shape(visual), visual.patch_embed.proj.weight
    geo = tower_geometry(visual, height, width)
    shares = spread(keep, count)
    inside = method.acts == "inside" and keep < geo.units * count
    plans = {
        s: method.rows(tower, geo.units, geo.windows, max(1, s)) if inside else [geo.units] * tower.depth
        for s in set(shares)
    }
    done, pruning, rows, owners, homes, base = 0, 0.0, [], [], [], 0
    entered, left, flat = [0] * tower.depth, [0] * tower.depth, inside
    chunk_units = chunk_units or units_at_a_time(weight.device)
    for chunk in in_grids(patches, geo.units * PATCHES, max(1, chunk_units // geo.units)):
        grids, rest = divmod(len(chunk), geo.units * PATCHES)
        if rest or done + grids > count:
            raise ValueError(f"patches do not add up to {count} grids of {geo.units} units")
        flat = flat and _is_flat(chunk.view(grids, -1, chunk.shape[1]))
        plan = [[plans[s][layer] for s in shares[done : done + grids]] for layer in range(tower.depth)]
        with weight.device:  # all bookkeeping lives beside the features
            x, layout, seconds = _run_tower(visual, tower, chunk.to(weight), full_layout(geo, grids), plan, method)
        for layer in range(tower.depth):
            entered[layer] += sum(plan[layer - 1]) if layer else grids * geo.units
            left[layer] += sum(plan[layer])
        order = layout.home.argsort()
        number = order.argsort()  # where each row comes to lie
        rows.append(visual.merger.mlp(_norm(x[order], visual.merger.ln_q.weight).flatten(1)))
        owners.append(number[layout.owner] + base)
        homes.append(layout.home[order] + done * geo.units)
        base, done, pruning = base + len(order), done + grids, pruning + seconds
    if done != count:
        raise ValueError(f"patches end after {done} of {count} grids")
    start = now(weight.device)
    rows, owner, home = torch.cat(rows), torch.cat(owners), torch.cat(homes)
    with weight.device:
        chosen = torch.arange(len(home))
        if method.acts == "after":
            chosen = method.select(Tokens(rows, home, grid, seconds_per_grid, seed), keep)
        elif inside and len(home) > keep:
            chosen = _largest(torch.bincount(owner, minlength=len(home)), keep)
    if isinstance(chosen, Selection):
        chosen, features = chosen.kept, chosen.features(rows)
    else:
        chosen = chosen.to(home.device)
        features = rows[chosen]
    pruning += now(weight.device) - start
    layers = [(layer, entered[layer], left[layer]) for layer in range(tower.depth)]
    return Encoded(features, home[chosen], rows, owner, (grid,), layers, pruning, flat)


def _is_flat(grids: torch.Tensor) -> bool:
    """Whether all patches of each grid `[T, patches, 1176]` are the same but for less than a level of 255."""
    return bool((grids.amax(1) - grids.amin(1)).max() < 1 / 255)


def _largest(size: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` rows that stand for most units, ascending. Among equals those that lie evenly through the video.

    This is the last resort for a count below one row a grid, which no merging inside grids can reach.
    """
    order = torch.arange(len(size))
    even = order * keep // len(size)  # a new value wherever an even choice would take the next row
    first = torch.cat([torch.ones(1, dtype=torch.bool), even[1:] != even[:-1]])
    rank = (size * 2 + first).argsort(descending=True, stable=True)
    return rank[:keep].sort().values


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm in float32, rounded before it is scaled, as Hugging Face has it; in fewer passes than F.rms_norm on CPUs."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(x.shape[-1]).add_(1e-6).rsqrt_()
    return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)


def _rotary(config, geo: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[units, 4, head_dim]` in float32, by raster place; the first half of the sines is negated. Half of the pairs
    turn with a patch's row, half with its column."""
    merge, quarter = config.spatial_merge_size, config.hidden_size // config.num_heads // 4
    speed = 10000.0 ** (torch.arange(quarter) / -quarter)
    y, x = torch.meshgrid(torch.arange(geo.height), torch.arange(geo.width), indexing="ij")
    dy, dx = torch.meshgrid(torch.arange(merge), torch.arange(merge), indexing="ij")
    at = torch.stack([(y.flatten()[:, None] * merge + dy.flatten()), (x.flatten()[:, None] * merge + dx.flatten())], -1)
    angle = (at[..., None].float() * speed).flatten(2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in float32, as Hugging Face has it: x `[R, 4, 2, heads, d]`, cos and sin `[R, 4, 1, 1, d]`."""
    wide = x.float()
    other = wide.roll(x.shape[-1] // 2, -1)
    return (wide * cos).addcmul_(other, sin).to(x.dtype)


def _run_tower(
    visual, tower: TowerShape, patches: torch.Tensor, layout: TokenLayout, plan: list[list[int]], method: Method
) -> tuple[torch.Tensor, TokenLayout, float]:
    """All layers on one chunk; `plan[layer][grid]` rows are left after each.

    Returns:
        Rows `[R, 4, hidden]` in window order, the layout they ended in, and the seconds that pruning took.
    """
    geo = layout.geometry
    weight = visual.patch_embed.proj.weight.flatten(1)
    x = F.linear(patches.view(-1, PATCHES, weight.shape[1])[layout.home], weight)
    table = _rotary(visual.config, geo)
    cos, sin = (t[layout.place][:, :, None, None] for t in table)
    size_bias, heads = method.size_bias, visual.config.num_heads
    groups: dict[Scope, list[Bucket]] = {}
    rows, pruning = [geo.units] * layout.grids, 0.0
    for layer, block in enumerate(visual.blocks):
        scope = tower.scope(layer)
        if scope not in groups:
            groups[scope] = buckets(attention_groups(layout, scope))
        qkv = linear(block.attn.qkv, _norm(x, block.norm1.weight)).view(*x.shape[:2], 3, heads, -1)
        q, k = _rotate(qkv[:, :, :2], cos, sin).unbind(2)
        # Log of one is zero: no bias before anything was merged.
        bias = size_bias and layout.reach is not None
        reduces = plan[layer] != rows
        attention = torch.zeros(len(x)) if reduces and "attention" in method.needs else None
        mixed, spent = grouped_attention(q, k, qkv[:, :, 2], groups[scope], bias, attention)
        pruning += spent
        x = linear(block.attn.proj, mixed.flatten(2), plus=x)
        hidden = _norm(x, block.norm2.weight)
        hidden = linear(block.mlp.up_proj, hidden, times=linear(block.mlp.gate_proj, hidden, silu=True))
        x = linear(block.mlp.down_proj, hidden, plus=x)
        if reduces:
            start = now(x.device)
            features = (
                x.flatten(1).float() if "hidden" in method.needs
                else unit_features(qkv[:, :, 1] if "keys" in method.needs else k)
            )  # fmt: skip
            x, layout = reduce_rows(x, layout, scope, plan[layer], features, attention, method)
            cos, sin = (t[layout.place][:, :, None, None] for t in table)
            groups, rows = {}, plan[layer]
            pruning += now(x.device) - start
    return x, layout, pruning


def reduce_rows(
    x: torch.Tensor,
    layout: TokenLayout,
    scope: Scope,
    target: list[int],
    features: torch.Tensor,
    attention: torch.Tensor | None,
    method: Method,
) -> tuple[torch.Tensor, TokenLayout]:
    """Merges rows inside windows or grids until each grid has its target, in as many rounds as the method needs.

    Args:
        x: `[R, 4, hidden]`.
        target: rows to be left in each grid.
        features: float32 `[R, D]`, attention: float32 `[R]` or None: what the method compares. A merged row has the mean of the
            features and the sum of the attention of what went into it.

    Raises:
        RuntimeError: the method merged nothing though it was asked to.
    """
    rows_in = torch.bincount(layout.group_of(layout.home, scope), minlength=layout.group_count(scope)).tolist()
    per_grid = len(rows_in) // layout.grids
    wanted = torch.tensor(
        [
            share
            for g, total in enumerate(target)
            for share in share_by_size(rows_in[g * per_grid : (g + 1) * per_grid], total)
        ]
    )
    while True:
        group = layout.group_of(layout.home, scope)
        length = torch.bincount(group, minlength=len(wanted))
        busy = (length > wanted).nonzero().flatten()
        if not len(busy):
            return x, layout
        start = length.cumsum(0) - length
        step = torch.arange(int(length[busy].max()))
        valid = step < length[busy][:, None]
        row = start[busy][:, None] + torch.minimum(step, length[busy][:, None] - 1)
        candidates = Candidates(
            features[row],
            None if attention is None else attention[row],
            layout.place[row],
            layout.size[row],
            valid,
            layout.geometry.width,
        )
        local = method.match(candidates, length[busy] - wanted[busy])
        into = torch.arange(layout.rows)
        into[row[valid]] = row.gather(1, local)[valid]
        if (into == torch.arange(len(into))).all():
            raise RuntimeError(f"method {method.name} merged nothing in a {scope} that must lose rows")
        size = layout.size
        x, features = merge_rows(x, size, into), merge_rows(features, size, into)
        if attention is not None:
            stays = into == torch.arange(len(into))
            attention = torch.zeros_like(attention).index_add_(0, into, attention)[stays]
        layout = merged_layout(layout, into, scope)
