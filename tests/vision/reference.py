"""A slow reference implementation of the pruned encoder: Python loops over rows and groups, with dense math in float64.

It follows the docstrings of the encoder and the methods, and shares only the plan's row counts, the selector and the weights with
the real encoder. It encodes all frame pairs at once, without chunks and without state carried between them.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

import torch

from evoprune.methods import Tokens, TowerShape
from evoprune.vision.layout import Geometry, geometry
from tests.methods.tokens import plan_of
from tests.vision.tower import group_key, place_key


@dataclass
class Row:
    unit: int  # the unit at the row's place
    units: list[int]  # all units that the row represents
    x: torch.Tensor  # [4, hidden]
    q: torch.Tensor | None = None  # [4, heads, d], like k, v and the keys before rotary
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    plain: torch.Tensor | None = None
    feature: torch.Tensor | None = None
    attention: float = 0.0
    deep: list[torch.Tensor] = field(default_factory=list)  # DeepStack features so far, each [D]


@torch.no_grad()
def encode_slowly(visual, patches, grid, method, keep, changed=None) -> tuple[list[int], list[int], torch.Tensor]:
    """Return the units of the last rows in ascending order, the row index of each unit, and the rows' tokens `[R, D]`.

    Args:
        changed: bool `[T, H*W]`, the units that differ from the last encoded unit at the same place, or None if all units do. In
            the first frame pair, all units are considered changed.
    """
    rows = rows_slowly(visual, patches, grid, method, keep, changed)
    tokens = [merged_patches(visual.merger, row.x) for row in rows]
    return [row.unit for row in rows], owners(rows, math.prod(grid)), torch.stack(tokens)


@torch.no_grad()
def rows_slowly(visual, patches, grid, method, keep, changed=None) -> list[Row]:
    """Return the rows after the last layer, ascending by unit. Arguments as in `encode_slowly`."""
    geo, total = geometry(*grid[1:]), math.prod(grid)
    shape = TowerShape.of_tower(visual)
    plan = plan_of(method, shape, grid, keep)
    stages = {stage.first_layer: stage for stage in plan.stages}
    merger = next((stage.reduce.merger for stage in plan.inside_pairs), None)
    rows = embedded(visual, patches, geo, total, changed)
    inner = list(getattr(visual.config, "deepstack_visual_indexes", ()))
    for layer, block in enumerate(visual.blocks):
        if layer in stages and stages[layer] in plan.row_stages:
            rows = selected(block, rows, geo, grid, stages[layer].selector, stages[layer].rows)
        run_layer(block, rows, geo, shape.scope(layer), not merger or merger.size_bias)
        if merger and layer + 1 in stages:
            rows = merged(rows, geo, shape.scope(layer), merger, stages[layer + 1].reduce.left)
        for row in rows if layer in inner else []:
            row.deep.append(merged_patches(visual.deepstack_merger_list[inner.index(layer)], row.x))
    return sorted(rows, key=lambda row: row.unit)


@torch.no_grad()
def tokens_slowly(
    visual, patches, grid, method, keep, changed=None
) -> tuple[list[int], torch.Tensor, torch.Tensor | None]:
    """Return the units that the language model reads, their features `[1 + n, K, D]` (the last layer's first), and their sizes."""
    rows = rows_slowly(visual, patches, grid, method, keep, changed)
    last = torch.stack([merged_patches(visual.merger, row.x) for row in rows])
    every = torch.stack([last, *(torch.stack(layer) for layer in zip(*(row.deep for row in rows), strict=True))])
    owner, stage = owners(rows, math.prod(grid)), plan_of(method, TowerShape.of_tower(visual), grid, keep).token_stage
    if stage is None:  # the rows are the tokens
        return [row.unit for row in rows], every, None
    found = stage.selector.select(Tokens(last.float(), torch.tensor(owner), grid), keep)
    kept = found.kept.tolist()
    if found.unit_to_token is None:
        return kept, every[:, [owner[unit] for unit in kept]], found.size
    clusters = [[unit for unit in range(math.prod(grid)) if found.unit_to_token[unit] == k] for k in range(len(kept))]
    means = [sum(every[:, owner[unit]] for unit in cluster) / len(cluster) for cluster in clusters]
    return kept, torch.stack(means, 1), found.size


def merged_patches(merger, x: torch.Tensor) -> torch.Tensor:
    """Apply a patch merger to one row `[4, hidden]`."""
    if hasattr(merger, "ln_q"):
        normed, first, second = rms_norm(merger.ln_q, x).flatten(), merger.mlp[0], merger.mlp[2]
    else:
        after = len(merger.norm.weight) > x.shape[1]
        normed = layer_norm(merger.norm, x.flatten() if after else x).flatten()
        first, second = merger.linear_fc1, merger.linear_fc2
    hidden = linear(first, normed)
    return linear(second, hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def embedded(visual, patches, geo: Geometry, total: int, changed: torch.Tensor | None = None) -> list[Row]:
    """Return a row for each encoded unit, in window order. It represents its place until that place is encoded again."""
    embedding = visual.patch_embed.proj.weight.double().flatten(1)
    pixels = patches.double().view(total, 4, -1)
    latest: dict[int, Row] = {}  # latest row at each place
    rows = []
    for unit in range(total):
        pair, place = divmod(unit, geo.units)
        if changed is None or changed[pair, place]:
            latest[place] = Row(unit, [], pixels[unit] @ embedding.T + added(visual, geo, place))
            rows.append(latest[place])
        latest[place].units.append(unit)
    return sorted(rows, key=lambda row: place_key(geo, row.unit))


def added(visual, geo: Geometry, place: int) -> torch.Tensor | float:
    """Return the patch embedding's bias plus the learned positions of a unit's patches, `[4, hidden]`, or 0 without them."""
    if not hasattr(visual, "pos_embed"):
        return 0.0
    table, (y, x) = visual.pos_embed.weight.double(), divmod(place, geo.width)
    side, made = math.isqrt(len(table)), []
    for patch in range(4):
        at = [(2 * y + patch // 2) / (2 * geo.height - 1), (2 * x + patch % 2) / (2 * geo.width - 1)]
        found = 0.0
        for corner in range(4):
            weight, index = 1.0, 0
            for share, far in zip(at, divmod(corner, 2), strict=True):
                low = min(int(share * (side - 1)), side - 2)
                weight *= 1 - abs(share * (side - 1) - low - far)
                index = index * side + low + far
            found = found + weight * table[index]
        made.append(found)
    return torch.stack(made) + visual.patch_embed.proj.bias.double()


def owners(rows: list[Row], total: int) -> list[int]:
    return [next(i for i, row in enumerate(rows) if unit in row.units) for unit in range(total)]


def selected(block, rows: list[Row], geo: Geometry, grid, selector, keep) -> list[Row]:
    """Return the rows that the method selects, each the mean of its cluster. A still clip that is kept whole keeps all rows."""
    rows = sorted(rows, key=lambda row: row.unit)
    units = range(math.prod(grid))
    owner = owners(rows, len(units))
    if keep < len(rows) or any(owner[unit] != owner[unit % geo.units] for unit in units):
        as_it_is = "hidden" in selector.needs
        seen = torch.stack([(row.x if as_it_is else normed(block.norm1, row.x)).flatten() for row in rows])
        found = selector.select(Tokens(seen, torch.tensor(owner), grid), min(keep, len(rows)))
        made, kept, joins = [], found.kept.tolist(), found.unit_to_token
        if joins is None:  # a unit joins the most similar kept unit, and a kept unit joins itself
            likeness = torch.nn.functional.cosine_similarity(seen[:, None], seen[[owner[unit] for unit in kept]], -1)
            joins = [kept.index(unit) if unit in kept else int(likeness[owner[unit]].argmax()) for unit in units]
        for k, unit in enumerate(kept):
            cluster = [other for other in units if joins[other] == k]
            mean_of = cluster if getattr(selector, "average", found.unit_to_token is not None) else [unit]
            row = Row(unit, cluster, sum(rows[owner[other]].x for other in mean_of) / len(mean_of))
            row.deep = mean_deep([rows[owner[other]].deep for other in mean_of], [1] * len(mean_of))
            made.append(row)
        rows = made
    return sorted(rows, key=lambda row: place_key(geo, row.unit))


def mean_deep(deep: list[list[torch.Tensor]], weights: list[int]) -> list[torch.Tensor]:
    """Return the weighted mean of DeepStack features, layer by layer."""
    of_layers = zip(*deep, strict=True)
    return [sum(w * x for w, x in zip(weights, each, strict=True)) / sum(weights) for each in of_layers]


def merged(rows: list[Row], geo: Geometry, scope: str, method, left: tuple[int, ...]) -> list[Row]:
    """Return the rows after a layer's merging. `left`: number of rows that remain in each frame pair."""
    result = []
    for row in rows:
        by = {"keys": row.plain, "keys_rotary": row.k}.get(method.features)
        row.feature = row.x.flatten() if by is None else by.mean(1).flatten()
    for pair, wanted in enumerate(left):
        groups: dict[tuple, list[Row]] = {}
        for row in rows:
            if row.unit // geo.units == pair:
                groups.setdefault(group_key(geo, row.unit, scope), []).append(row)
        counts = largest_remainder([len(group) for group in groups.values()], wanted)
        for group, few in zip(groups.values(), counts, strict=True):
            while len(group) > few:
                group = one_round(group, len(group) - few, method, geo)
            result += group
    return sorted(result, key=lambda row: place_key(geo, row.unit))


def linear(module, x: torch.Tensor) -> torch.Tensor:
    out = x @ module.weight.double().T
    return out if module.bias is None else out + module.bias.double()


def rms_norm(module, x: torch.Tensor) -> torch.Tensor:
    return module.weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def layer_norm(module, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return module.weight.double() * centred / scale + module.bias.double()


def normed(module, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(module, x) if getattr(module, "bias", None) is None else layer_norm(module, x)


def mlp(module, x: torch.Tensor) -> torch.Tensor:
    if hasattr(module, "gate_proj"):
        gate = linear(module.gate_proj, x)
        return linear(module.down_proj, gate * gate.sigmoid() * linear(module.up_proj, x))
    inner = linear(module.linear_fc1, x)
    curve = torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3))
    return linear(module.linear_fc2, 0.5 * inner * (1 + curve))


@cache
def angles(geo: Geometry, place: int, d: int) -> torch.Tensor:
    """Return the four patches' rotary angles, `[4, 1, d / 2]`: the first half from the patch's row, the second from its column."""
    y, x = divmod(place, geo.width)
    speeds = [10000.0 ** (-2 * j / (d // 2)) for j in range(d // 4)]
    at = [(2 * y + patch // 2, 2 * x + patch % 2) for patch in range(4)]
    return torch.tensor([[[row * s for s in speeds] + [column * s for s in speeds]] for row, column in at]).double()


def rotate(x: torch.Tensor, geo: Geometry, unit: int) -> torch.Tensor:
    """Apply the rotary embedding to `[4, heads, d]` by complex products. Pair i consists of entries i and i + d / 2."""
    a, b = x.chunk(2, dim=-1)
    turn = angles(geo, unit % geo.units, x.shape[-1])
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat([turned.real, turned.imag], dim=-1)


def run_layer(block, rows: list[Row], geo: Geometry, scope: str, size_bias: bool) -> None:
    """Run one layer of the tower. Stores queries, keys and the attention received from the own frame pair in the rows."""
    heads = block.attn.num_heads
    for row in rows:
        qkv = linear(block.attn.qkv, normed(block.norm1, row.x)).view(4, 3, heads, -1)
        row.plain, row.v = qkv[:, 1], qkv[:, 2]
        row.q, row.k = rotate(qkv[:, 0], geo, row.unit), rotate(qkv[:, 1], geo, row.unit)
        row.attention = 0.0
    answers = []
    owned = [Counter(group_key(geo, unit, scope) for unit in row.units) for row in rows]
    for name in sorted({group_key(geo, row.unit, scope) for row in rows}):
        asking = [row for row in rows if group_key(geo, row.unit, scope) == name]
        held = [(row, units[name]) for row, units in zip(rows, owned, strict=True) if units[name]]
        keys = torch.stack([row.k for row, _ in held])
        values = torch.stack([row.v for row, _ in held])
        bias = torch.tensor([math.log(times) if size_bias else 0.0 for _, times in held], dtype=torch.float64)
        for row in asking:
            scores = torch.einsum("phd,kshd->phks", row.q, keys) / math.sqrt(row.q.shape[-1]) + bias[:, None]
            share = scores.flatten(2).softmax(-1).view(scores.shape)
            answers.append((row, torch.einsum("phks,kshd->phd", share, values)))
            for (seen, _), got in zip(held, share.sum((0, 1, 3)) / (4 * heads * len(asking)), strict=True):
                if seen.unit // geo.units == asking[0].unit // geo.units:
                    seen.attention += float(got)
    for row, answer in answers:
        row.x = row.x + linear(block.attn.proj, answer.flatten(1))
        row.x = row.x + mlp(block.mlp, normed(block.norm2, row.x))


def largest_remainder(sizes: list[int], total: int) -> list[int]:
    """Return integer shares in proportion to `sizes`, each at least 1. If this minimum raises some shares, the largest ones shrink.

    Ties are broken by index.
    """
    exact = [Fraction(total * size, sum(sizes)) for size in sizes]
    counts = [max(1, math.floor(e)) for e in exact]
    while sum(counts) < total:
        i = max((i for i in range(len(sizes)) if counts[i] < sizes[i]), key=lambda i: (exact[i] - counts[i], -i))
        counts[i] += 1
    while sum(counts) > total:
        i = max((i for i in range(len(sizes)) if counts[i] > 1), key=lambda i: (counts[i] - exact[i], -i))
        counts[i] -= 1
    return counts


def rounded(value: float) -> float:
    """Round to 1/16384, so that smaller differences are ties."""
    return round(value * 16384) / 16384


def one_round(rows: list[Row], remove: int, method, geo: Geometry) -> list[Row]:
    """Merge bipartitely: the best pairs between every second row and the rows in between."""
    n = len(rows)
    unit = torch.stack([row.feature / row.feature.norm() for row in rows])
    cos = (unit @ unit.T).tolist()
    density = []
    for i in range(n):
        nearest = sorted((cos[i][j] for j in range(n) if j != i), reverse=True)[: method.neighbours]
        density.append(sum(nearest) / len(nearest))
    top = max(row.attention for row in rows)
    attention = [rounded(row.attention / top) for row in rows]

    def score(i: int, j: int) -> float:
        lone = max(1 - density[i], 1 - density[j])
        return rounded(cos[i][j] - method.diversity * lone - method.attention * max(attention[i], attention[j]))

    sources, destinations = range(method.absorbed, n, 2), range(1 - method.absorbed, n, 2)
    best = {i: max(destinations, key=lambda j: (score(i, j), -j)) for i in sources}
    ranked = sorted(range(n), key=lambda i: (-attention[i], i))
    critical = ranked[: math.ceil(n * Fraction(str(method.critical)))]
    order = sorted(sources, key=lambda i: (i in critical, -score(i, best[i]), i))
    remove = min(remove, n // 2)  # of an odd number of rows one stays, even if the first is absorbed
    clusters = {j: [j] for j in destinations} | {i: [i] for i in order[remove:]}
    for i in order[:remove]:
        clusters[best[i]].append(i)
    left = []
    for stays, cluster in clusters.items():
        if len(cluster) == 1:
            left.append(rows[stays])
            continue
        size = [len(rows[i].units) for i in cluster]
        row = Row(rows[stays].unit, [unit for i in cluster for unit in rows[i].units], rows[stays].x)
        row.x = sum(s * rows[i].x for s, i in zip(size, cluster, strict=True)) / sum(size)
        row.deep = mean_deep([rows[i].deep for i in cluster], size)
        row.feature = sum(s * rows[i].feature for s, i in zip(size, cluster, strict=True)) / sum(size)
        row.attention = sum(rows[i].attention for i in cluster)
        left.append(row)
    return sorted(left, key=lambda row: place_key(geo, row.unit))
