"""The vision tower, run on a model's weights, with rows merged between its layers.

Video comes in as patches, grid after grid, and is encoded in chunks of whole grids: no layer of the tower looks across grids, so
memory stays constant and the result does not depend on the chunk size. Without pruning the output is Hugging Face's, up to
rounding.

How many rows each layer leaves is known before the tower runs. So on a GPU every shape is known too, the host never waits for a
result before it asks for the next one, and what has to be looked at is looked at once, when all is encoded.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from evoprune.linear import linear
from evoprune.methods.base import Candidates, Method, Selection, Tokens
from evoprune.pruning.budget import spread
from evoprune.pruning.indices import runs, tally, true_indices
from evoprune.pruning.merge import merge_rows
from evoprune.pruning.reference import References, scan
from evoprune.pruning.schedule import TowerShape
from evoprune.pruning.score import unit_features
from evoprune.pruning.shares import share_rows
from evoprune.vision.attention import PATCHES, Bucket, Packed, buckets, grouped_attention
from evoprune.vision.layout import (
    Geometry,
    Scope,
    TokenLayout,
    attention_groups,
    full_layout,
    geometry,
    merged_layout,
    referring_layout,
)
from evoprune.vision.preprocess import patch_means
from evoprune.vision.stopwatch import Stopwatch

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


def static_shapes(device: torch.device) -> bool:
    """Whether shapes may not depend on values: on a GPU the host would have to wait for them.

    On a CPU looking is free, and saves padding and rounds that have nothing to do.
    """
    return device.type == "cuda"


def uploaded(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` from the host, sent without waiting for what the device still has to do."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


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
        chunk_units: units to encode at a time, rounded down to whole blocks of the method but at least one; default:
            `units_at_a_time`. Bounds the memory.

    Raises:
        ValueError: `patches` do not add up to the grid.
    """
    count, height, width = grid
    tower, weight = tower_shape(visual), visual.patch_embed.proj.weight
    geo = tower_geometry(visual, height, width)
    inside = method.acts == "inside" and keep < geo.units * count
    block = method.block if inside else 1
    shares = spread(keep, count)
    plan_of = cache(lambda rows, windows, left: method.rows(tower, rows, windows, left))
    done, rows, owners, homes, base = 0, [], [], [], 0
    past = Past()
    entered, left = [0] * tower.depth, [0] * tower.depth
    watch, uniform, wrong = Stopwatch(weight.device), [], []
    chunk_units = chunk_units or units_at_a_time(weight.device)
    for chunk in in_grids(patches, geo.units * PATCHES, max(1, chunk_units // geo.units // block) * block):
        grids, rest = divmod(len(chunk), geo.units * PATCHES)
        if rest or done + grids > count:
            raise ValueError(f"patches do not add up to {count} grids of {geo.units} units")
        if inside and (not uniform or static_shapes(chunk.device) or uniform[-1]):
            uniform.append(_is_flat(chunk.view(grids, -1, chunk.shape[1])))
        with weight.device:  # all bookkeeping lives beside the features
            layout, last = full_layout(geo, grids, block), None
            if inside and method.reuse:
                with watch:
                    layout, last = _referring(geo, chunk, done, block, method.reuse, past)
                    last = last if done + grids < count else None  # nobody will refer to the last chunk
            plan = [[n] * tower.depth for n in layout.per_block]
            if inside:
                due = [sum(shares[at : at + block]) for at in range(done, done + grids, block)]
                units = [geo.units * min(block, grids - at) for at in range(0, grids, block)]
                plan = [
                    plan_of(rows, size // geo.units * geo.windows, method.left(rows, size, max(1, share)))
                    for rows, size, share in zip(layout.per_block, units, due, strict=True)
                ]
            plan = list(zip(*plan, strict=True))
            for layer, (before, after) in enumerate(pairwise([layout.per_block, *plan])):
                entered[layer] += sum(before)
                left[layer] += sum(after)
            chunk = uploaded(chunk.to(weight.dtype), weight.device)
            x, layout = _run_tower(visual, tower, chunk, layout, plan, method, watch, wrong, last, past)
            order = layout.home.argsort()
            number = order.argsort() + base  # of each row among all rows
            if past.row is not None:
                number = torch.cat([number, past.row])
            owner = number[layout.owner]
            if last is not None:
                past.row = owner[last] if past.row is None else torch.where(last < 0, past.row, owner[last])
        if layout.rows:
            rows.append(visual.merger.mlp(_norm(x[order], visual.merger.ln_q.weight).flatten(1)))
        owners.append(owner)
        homes.append(layout.home[order] + done * geo.units)
        base, done = base + len(order), done + grids
    if done != count:
        raise ValueError(f"patches end after {done} of {count} grids")
    rows, owner, home = torch.cat(rows), torch.cat(owners), torch.cat(homes)
    with weight.device, watch:
        kept = home
        if method.selects and (inside or method.acts == "after"):
            kept = method.select(Tokens(rows, owner, grid, seconds_per_grid, seed), keep)
        elif inside and len(home) > keep:
            kept = home[_largest(tally(owner, len(home)), keep)]
        if isinstance(kept, Selection):
            kept, features = kept.kept, kept.features(rows)
        else:
            kept = uploaded(kept, home.device)
            features = rows[owner[kept]]
    flat, seconds = _settled(method, uniform, wrong, watch)
    layers = [(layer, entered[layer], left[layer]) for layer in range(tower.depth)]
    return Encoded(features, kept, rows, owner, (grid,), layers, seconds, flat)


@dataclass
class Past:
    """What the grids of earlier chunks leave for the next one, so much a place and layer, however long the video is.

    Attributes:
        references: what changes are measured against.
        row: int64 `[P]`, which of all rows stands for the reference of each place.
        seen: of each layer, keys and values of that row as they were there, `[P, 2, 4, heads, d]`.
    """

    references: References | None = None
    row: torch.Tensor | None = None
    seen: list[torch.Tensor] | None = None


def _referring(
    geo: Geometry, chunk: torch.Tensor, done: int, block: int, threshold: float, past: Past
) -> tuple[TokenLayout, torch.Tensor]:
    """A layout in which what has not changed has its reference's row as owner, and what to refer to from now on.

    All of it is found on the CPU, so that counts are known before the tower runs.

    Args:
        chunk: patches of the grids from number `done` on.

    Returns:
        The layout; and int64 `[P]`, the unit of this chunk that is the reference of each place after it, -1 where it stays the one
        it was.
    """
    device = torch.get_default_device()
    with torch.device("cpu"):
        here = geometry(geo.height, geo.width, geo.side, "cpu")
        reuse, past.references = scan(patch_means(chunk.cpu(), geo.units), past.references, threshold)
        layout = referring_layout(here, reuse.grid - done, block)
        grid = past.references.grid - done
        last = torch.where(grid < 0, -1, grid * geo.units + torch.arange(geo.units))
    home, owner, last = (uploaded(x, device) for x in (layout.home, layout.owner, last))
    return replace(layout, geometry=geo, home=home, owner=owner), last


def _settled(
    method: Method, uniform: list[torch.Tensor], wrong: list[torch.Tensor], watch: Stopwatch
) -> tuple[bool, float]:
    """Looks at all that was left to be looked at: whether the video is flat, and the seconds of pruning.

    The one place where the host waits for a GPU.

    Raises:
        RuntimeError: some group did not lose the rows that it had to.
    """
    if wrong and torch.stack(wrong).any():
        raise RuntimeError(f"method {method.name} did not remove as many rows as it was asked to")
    return bool(uniform) and bool(torch.stack(uniform).all()), watch.seconds()


def _is_flat(grids: torch.Tensor) -> torch.Tensor:
    """Whether all patches of each grid `[T, patches, 1176]` are the same but for less than a level of 255; bool, no dimension."""
    return (grids.amax(1) - grids.amin(1)).max() < 1 / 255


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
) -> tuple[torch.Tensor, TokenLayout]:
    """All layers on one chunk; `plan[layer][block]` rows are left after each.

    Args:
        watch: measures what pruning takes.
        wrong: gets what `reduce_rows` could not check at once.
        last: from `_referring`, None without references and where no chunk follows.
        past: gets what later chunks will see.

    Returns:
        Rows `[R, 4, hidden]` in window order, and the layout they ended in.
    """
    geo = layout.geometry
    weight = visual.patch_embed.proj.weight.flatten(1)
    if not layout.rows:  # nothing new in any grid
        return weight.new_empty(0, PATCHES, len(weight)), layout
    x = F.linear(patches.view(-1, PATCHES, weight.shape[1])[layout.home], weight)
    table = _rotary(visual.config, geo)
    cos, sin = (t[layout.place][:, :, None, None] for t in table)
    size_bias, heads = method.size_bias, visual.config.num_heads
    groups: dict[Scope, list[Bucket] | Packed] = {}
    rows, before, past.seen = layout.per_block, past.seen, None if last is None else []
    for layer, block in enumerate(visual.blocks):
        scope = tower.scope(layer)
        if scope not in groups:
            groups[scope] = (
                Packed(attention_groups(layout, scope, exact=False), layout.rows)
                if static_shapes(x.device)
                else buckets(attention_groups(layout, scope))
            )
        qkv = linear(block.attn.qkv, _norm(x, block.norm1.weight)).view(*x.shape[:2], 3, heads, -1)
        q, k = _rotate(qkv[:, :, :2], cos, sin).unbind(2)
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
        x = linear(block.attn.proj, mixed.flatten(2), plus=x)
        hidden = _norm(x, block.norm2.weight)
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


def reduce_rows(
    x: torch.Tensor,
    layout: TokenLayout,
    scope: Scope,
    target: Sequence[int],
    features: torch.Tensor,
    attention: torch.Tensor | None,
    method: Method,
) -> tuple[torch.Tensor, TokenLayout, torch.Tensor | None]:
    """Merges rows inside windows or blocks until each block has its target, in as many rounds as the method needs.

    Where shapes are static nobody looks whether a round is the last one that is needed: there are as many as it can take, and
    until the last one rows that went are kept at the end as padding.

    Args:
        x: `[R, 4, hidden]`.
        target: rows to be left in each block; windows are for blocks of a single grid.
        features: float32 `[R, D]`, attention: float32 `[R]` or None: what the method compares. A merged row has the mean of the
            features and the sum of the attention of what went into it.

    Returns:
        Rows and layout; and, where shapes are static, whether some group did not lose what it had to (bool, no dimension).

    Raises:
        RuntimeError: the method merged nothing though it was asked to, or too much; where shapes are not static.
    """
    static, moves = static_shapes(x.device), layout.rows - sum(target)
    total, longest = layout.group_count(scope), layout.longest(scope)
    length = tally(layout.group_of(layout.home, scope), total)
    goal = uploaded(torch.tensor(target, device="cpu"), x.device)
    wanted = share_rows(length.view(len(target), -1), goal, longest).flatten()
    rounds = most_rounds(layout, scope, target, method) if static else moves
    for after in reversed(range(rounds)):
        length = tally(layout.group_of(layout.home, scope), total + 1)[:total]  # padding is a group more
        start, remove = length.cumsum(0) - length, length - wanted
        if not static:
            busy = (remove > 0).nonzero().flatten()
            if not len(busy):
                break
            start, length, remove = start[busy], length[busy], remove[busy]
            longest = int(length.max())
        row, valid = runs(start, length, longest, layout.rows)
        candidates = Candidates(
            features[row],
            None if attention is None else attention[row],
            layout.place[row],
            layout.home[row] // layout.geometry.units % layout.block,
            layout.size[row],
            valid,
            layout.geometry.width,
        )
        local = method.match(candidates, remove)
        into = torch.arange(layout.rows + 1)  # the last entry takes what padding says
        into.scatter_(0, torch.where(valid, row, layout.rows).flatten(), row.gather(1, local).flatten())
        into = into[:-1]
        stays = into == torch.arange(layout.rows)
        left = layout.rows if after else sum(target)
        if not static:
            left = int(stays.sum())
            moves = layout.rows - left
            if not moves:
                raise RuntimeError(f"method {method.name} merged nothing in a {scope} that must lose rows")
        size = layout.size
        x, features = merge_rows(x, size, into, left, moves), merge_rows(features, size, into, left, moves)
        if attention is not None:
            attention = torch.zeros_like(attention).index_add_(0, into, attention)[true_indices(stays, left)]
        counts = tuple(target) if left == sum(target) else None
        layout = merged_layout(layout, into, scope, left, counts)
    if not static:
        if layout.rows != sum(target):
            raise RuntimeError(f"method {method.name} left {layout.rows} rows where {sum(target)} were planned")
        return x, layout, None
    failed = (tally(layout.group_of(layout.home, scope), total + 1)[:total] != wanted).any()
    # If it has merged too much there is still padding. Until that can be said, at the end, it must not lead out of the last grid.
    return x, replace(layout, home=layout.home.clamp(max=len(layout.owner) - 1)), failed


def most_rounds(layout: TokenLayout, scope: Scope, target: Sequence[int], method: Method) -> int:
    """After how many rounds every group has lost what it must, whatever the rows are."""
    worst = 0
    for rows, left in set(zip(layout.per_block, target, strict=True)):
        if scope == "block":
            worst = max(worst, method.rounds(rows, left))
        else:  # how many rows a window has and loses, only the device knows
            longest = min(rows, layout.geometry.largest_window)
            cases = ((n, max(1, n - (rows - left))) for n in range(1, longest + 1))
            worst = max([worst, *(method.rounds(n, fewest) for n, fewest in cases)])
    return worst
