"""The pruned encoder once more, slowly: Python loops over rows and groups, dense mathematics in float64.

Written from what the docstrings of the encoder and of the method promise; shares nothing with them but the row counts of the
schedule, which rows a method chooses inside the tower, and the module's weights. All grids are encoded at once, whatever refers to
whatever: no chunks, nothing carried.
"""

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch

from evoprune.methods.base import Tokens
from evoprune.pruning.budget import spread
from evoprune.pruning.schedule import TowerShape
from evoprune.vision.layout import Geometry, geometry
from tests.vision.tower import group_key, place_key


@dataclass
class Row:
    home: int
    units: list[int]  # all that it owns, of its own block and of later ones
    x: torch.Tensor  # [4, hidden]
    q: torch.Tensor | None = None  # [4, heads, d], as are k, v and the keys before rotary
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    plain: torch.Tensor | None = None
    feature: torch.Tensor | None = None
    attention: float = 0.0


@torch.no_grad()
def encode_slowly(visual, patches, grid, method, keep, changed=None) -> tuple[list[int], list[int], torch.Tensor]:
    """Homes of the rows that are left, ascending; which of them stands for each unit; and their tokens `[R, D]`.

    Args:
        changed: bool `[T, H*W]`, which units differ from what was last encoded in their place; None for all. The first grid's do.
    """
    count, height, width = grid
    geo = geometry(height, width, 4)
    tower = TowerShape(len(visual.blocks), tuple(visual.fullatt_block_indexes))
    embedding = visual.patch_embed.proj.weight.double().flatten(1)
    pixels = patches.double().view(count * geo.units, 4, -1)
    newest: dict[int, Row] = {}  # of each place
    rows = []
    for unit in range(count * geo.units):
        g, place = divmod(unit, geo.units)
        if changed is None or changed[g, place]:
            newest[place] = Row(unit, [], pixels[unit] @ embedding.T)
            rows.append(newest[place])
        newest[place].units.append(unit)
    rows.sort(key=lambda row: place_key(geo, row.home))
    plans = []
    for first in range(0, count, method.block):
        grids = min(method.block, count - first)
        live = sum(first <= row.home // geo.units < first + grids for row in rows)
        due = max(1, sum(spread(keep, count)[first : first + grids]))
        left = min(live, method.allowance(grids * geo.units, due))
        plans.append(method.rows(tower, live, grids * geo.windows, left))
    early = (
        method.narrows_after(tower, keep / (count * geo.units)) if method.prunes(keep / (count * geo.units)) else None
    )
    for layer, block in enumerate(visual.blocks):
        if layer == early:
            rows, plans = narrowed(block, rows, geo, grid, method, keep), []
        scope = "grid" if layer in visual.fullatt_block_indexes else "window"
        run_layer(block, rows, geo, scope, method)
        for row in rows:
            by = {"keys": row.plain, "keys_rotary": row.k}.get(method.features)
            row.feature = row.x.flatten() if by is None else by.mean(1).flatten()
        for b, plan in enumerate(plans):
            inside = [row for row in rows if block_of(geo, row.home, method) == b]
            if len(inside) > plan[layer]:
                groups: dict[tuple, list[Row]] = {}
                for row in inside:
                    windows = scope == "window" and method.windows and method.block == 1
                    groups.setdefault(group_key(geo, row.home, "window") if windows else (), []).append(row)
                left = largest_remainder([len(group) for group in groups.values()], plan[layer])
                for group, wanted in zip(groups.values(), left, strict=True):
                    merged = reduce_group(group, wanted, method, geo)
                    rows = [row for row in rows if all(row is not old for old in group)] + merged
        rows.sort(key=lambda row: place_key(geo, row.home))
    rows.sort(key=lambda row: row.home)
    owner = [next(i for i, row in enumerate(rows) if unit in row.units) for unit in range(count * geo.units)]
    first, second = visual.merger.mlp[0], visual.merger.mlp[2]
    tokens = []
    for row in rows:
        hidden = linear(first, rms_norm(visual.merger.ln_q, row.x).flatten())
        tokens.append(linear(second, hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))))
    return [row.home for row in rows], owner, torch.stack(tokens)


def narrowed(block, rows: list[Row], geo: Geometry, grid, method, keep) -> list[Row]:
    """The rows that the method chooses, each the mean over the units that it then stands for; all if it chooses none."""
    rows = sorted(rows, key=lambda row: row.home)
    units = range(grid[0] * geo.units)
    owner = torch.tensor([next(i for i, row in enumerate(rows) if unit in row.units) for unit in units])
    seen = torch.stack([rms_norm(block.norm1, row.x).flatten() for row in rows])
    chosen = method.narrow(Tokens(seen, owner, grid, 1.0, 0), keep)
    if chosen is not None:
        made = []
        for k, home in enumerate(chosen.kept.tolist()):
            stands = [unit for unit in units if chosen.owner[unit] == k]
            shown = stands if method.average else [home]
            made.append(Row(home, stands, sum(rows[owner[unit]].x for unit in shown) / len(shown)))
        rows = made
    return sorted(rows, key=lambda row: place_key(geo, row.home))


def block_of(geo: Geometry, unit: int, method) -> int:
    return unit // geo.units // method.block


def linear(module, x: torch.Tensor) -> torch.Tensor:
    out = x @ module.weight.double().T
    return out if module.bias is None else out + module.bias.double()


def rms_norm(module, x: torch.Tensor) -> torch.Tensor:
    return module.weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@cache
def angles(geo: Geometry, place: int, d: int) -> torch.Tensor:
    """How far each pair of each patch turns, `[4, 1, d / 2]`: the first half by the patch's row, the second by its column."""
    y, x = divmod(place, geo.width)
    speeds = [10000.0 ** (-2 * j / (d // 2)) for j in range(d // 4)]
    at = [(2 * y + patch // 2, 2 * x + patch % 2) for patch in range(4)]
    return torch.tensor([[[row * s for s in speeds] + [column * s for s in speeds]] for row, column in at]).double()


def rotate(x: torch.Tensor, geo: Geometry, home: int) -> torch.Tensor:
    """Rotary embedding of `[4, heads, d]` as a product of complex numbers: pair i is made of entries i and i + d / 2."""
    a, b = x.chunk(2, dim=-1)
    turn = angles(geo, home % geo.units, x.shape[-1])
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat([turned.real, turned.imag], dim=-1)


def run_layer(block, rows: list[Row], geo: Geometry, scope: str, method) -> None:
    """One layer of the tower; leaves queries, keys and the attention received in the rows.

    What later blocks attend to is not known when a block is encoded, so a row receives attention from its own block alone.
    """
    heads = block.attn.num_heads
    for row in rows:
        qkv = linear(block.attn.qkv, rms_norm(block.norm1, row.x)).view(4, 3, heads, -1)
        row.plain, row.v = qkv[:, 1], qkv[:, 2]
        row.q, row.k = rotate(qkv[:, 0], geo, row.home), rotate(qkv[:, 1], geo, row.home)
        row.attention = 0.0
    answers = []
    owned = [Counter(group_key(geo, unit, scope) for unit in row.units) for row in rows]
    for name in sorted({group_key(geo, row.home, scope) for row in rows}):
        asking = [row for row in rows if group_key(geo, row.home, scope) == name]
        held = [(row, units[name]) for row, units in zip(rows, owned, strict=True) if units[name]]
        keys = torch.stack([row.k for row, _ in held])
        values = torch.stack([row.v for row, _ in held])
        bias = torch.tensor([math.log(times) if method.size_bias else 0.0 for _, times in held], dtype=torch.float64)
        for row in asking:
            scores = torch.einsum("phd,kshd->phks", row.q, keys) / math.sqrt(row.q.shape[-1]) + bias[:, None]
            share = scores.flatten(2).softmax(-1).view(scores.shape)
            answers.append((row, torch.einsum("phks,kshd->phd", share, values)))
            for (seen, _), got in zip(held, share.sum((0, 1, 3)) / (4 * heads * len(asking)), strict=True):
                if block_of(geo, seen.home, method) == block_of(geo, asking[0].home, method):
                    seen.attention += float(got)
    for row, answer in answers:
        row.x = row.x + linear(block.attn.proj, answer.flatten(1))
        hidden = rms_norm(block.norm2, row.x)
        gate = linear(block.mlp.gate_proj, hidden)
        row.x = row.x + linear(block.mlp.down_proj, gate * gate.sigmoid() * linear(block.mlp.up_proj, hidden))


def largest_remainder(sizes: list[int], total: int) -> list[int]:
    """Shares in proportion to `sizes`, at least one each; where that floor binds, whoever is most over its share gives.

    Ties go by index.
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


def reduce_group(rows: list[Row], wanted: int, method, geo: Geometry) -> list[Row]:
    """Rounds of bipartite merging until `wanted` rows are left."""
    while len(rows) > wanted:
        rows = one_round(rows, len(rows) - wanted, method, geo)
    return rows


def settled(value: float) -> float:
    """Differences below 1/16384 do not count."""
    return round(value * 16384) / 16384


def dark_place(unit: int, method, geo: Geometry) -> bool:
    """The colour of a place on a checkerboard that is turned round in every second grid of a block."""
    grid, place = divmod(unit, geo.units)
    return (sum(divmod(place, geo.width)) + grid % method.block) % 2 == 1


def one_round(rows: list[Row], remove: int, method, geo: Geometry) -> list[Row]:
    n = len(rows)
    unit = torch.stack([row.feature / row.feature.norm() for row in rows])
    cos = (unit @ unit.T).tolist()
    density = []
    for i in range(n):
        nearest = sorted((cos[i][j] for j in range(n) if j != i), reverse=True)[: method.neighbours]
        density.append(sum(nearest) / len(nearest))
    top = max(row.attention for row in rows)
    attention = [settled(row.attention / top) for row in rows]

    def score(i: int, j: int) -> float:
        lone = max(1 - density[i], 1 - density[j])
        return settled(cos[i][j] - method.diversity * lone - method.attention * max(attention[i], attention[j]))

    sources = [i for i in range(n) if i % 2 == 1]
    if method.split == "checkerboard":
        dark = [i for i in range(n) if dark_place(rows[i].home, method, geo)]
        if 0 < len(dark) < n:
            sources = dark
    destinations = [j for j in range(n) if j not in sources]
    best = {i: max(destinations, key=lambda j: (score(i, j), -j)) for i in sources}
    ranked = sorted(range(n), key=lambda i: (-attention[i], i))
    critical = ranked[: math.ceil(n * Fraction(str(method.critical)))]
    order = sorted(sources, key=lambda i: (i in critical, -score(i, best[i]), i))
    parties = {j: [j] for j in destinations} | {i: [i] for i in order[remove:]}
    for i in order[:remove]:
        parties[best[i]].append(i)
    left = []
    for stays, party in parties.items():
        if len(party) == 1:
            left.append(rows[stays])
            continue
        at = min(party, key=lambda i: (-attention[i], i)) if method.survivor == "attended" else stays
        own = block_of(geo, rows[at].home, method)
        size = [sum(block_of(geo, unit, method) == own for unit in rows[i].units) for i in party]
        row = Row(rows[at].home, [unit for i in party for unit in rows[i].units], rows[at].x)
        row.x = sum(s * rows[i].x for s, i in zip(size, party, strict=True)) / sum(size)
        row.feature = sum(s * rows[i].feature for s, i in zip(size, party, strict=True)) / sum(size)
        row.attention = sum(rows[i].attention for i in party)
        left.append(row)
    return sorted(left, key=lambda row: place_key(geo, row.home))
