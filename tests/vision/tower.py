"""A vision tower small enough for loops in Python, and randomly merged rows."""

from functools import cache

import torch

from evoprune.vision.layout import Geometry, window_order
from evoprune.vision.rows import Rows, all_units, reused_units
from tests.tiny import QWEN2_5_VISION, QWEN3_VISION

PATCH_WIDTH, QWEN3_WIDTH = 1176, 1536
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 24}


@cache
def tiny_tower(full_layers: tuple[int, ...] = (1, 3), depth: int = 4, seed: int = 0):
    """Return a small Hugging Face tower in float32, with hidden size 32 and two heads. Tests share it and must not change it.

    The weights are large enough that attention is far from uniform and every layer changes its input.
    """
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    sizes = QWEN2_5_VISION | SMALL | {"depth": depth, "fullatt_block_indexes": list(full_layers)}
    return _drawn(Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLConfig(vision_config=sizes), seed)


DEEPSTACK = (1, 3, 4)  # layers of `tiny_qwen3`


@cache
def tiny_qwen3(depth: int = 6, seed: int = 0):
    """Return the same for Qwen3-VL, with 5x5 learned positions; patches have 1,536 values."""
    from transformers import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    sizes = QWEN3_VISION | SMALL | {"depth": depth, "deepstack_visual_indexes": list(DEEPSTACK)}
    return _drawn(Qwen3VLVisionModel, Qwen3VLConfig(vision_config=sizes), seed)


def _drawn(kind, config, seed: int):
    tower = kind._from_config(config.vision_config, dtype=torch.float32, attn_implementation="sdpa")
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1 if "pos_embed" in name else weight[0].numel() ** -0.5, generator=random)
            else:
                weight.normal_(0.0 if name.endswith("bias") else 1.0, 0.1, generator=random)
    return tower.eval()


def random_patches(grid: tuple[int, int, int], seed: int = 0, width: int = PATCH_WIDTH) -> torch.Tensor:
    """Return patches of a noise video, `[rows, width]`."""
    t, h, w = grid
    return torch.randn(t * h * w * 4, width, generator=torch.Generator().manual_seed(seed))


def numbered(geo: Geometry, pairs: int) -> Rows:
    """Return a row for each unit, with the unit's number as its value."""
    units = window_order(geo, pairs)
    return all_units(units[:, None].float(), torch.empty(len(units), 0, 1), geo, pairs)


def merge_at_random(rows: Rows, scope: str, seed: int, share: float = 0.6) -> Rows:
    """Merge about `share` of the rows in each window or frame pair into other rows there."""
    random = torch.Generator().manual_seed(seed)
    group = rows.group(scope)
    into = torch.arange(len(rows))
    for g in group.unique():
        members = (group == g).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=random)]
        going = min(len(members) - 1, round(len(members) * share * float(torch.rand(1, generator=random)) * 2))
        if going > 0:
            staying = members[going:]
            into[members[:going]] = staying[torch.randint(len(staying), (going,), generator=random)]
    moves = int((into != torch.arange(len(rows))).sum())
    return rows.merge(into, scope, len(rows) - moves, moves)


def random_rows(geo: Geometry, pairs: int, scopes: list[str], seed: int = 0, share: float = 0.6) -> Rows:
    """Return all rows after one round of random merges for each entry of `scopes`."""
    rows = numbered(geo, pairs)
    for step, scope in enumerate(scopes):
        rows = merge_at_random(rows, scope, seed * 31 + step, share)
    return rows


def referring(geo: Geometry, source: torch.Tensor) -> Rows:
    """Return the rows with reuse."""
    alive = source == torch.arange(len(source))[:, None]
    counts = tuple(alive.sum(1).tolist())
    unit = window_order(geo, len(source), alive, sum(counts))
    return reused_units(unit[:, None].float(), torch.empty(len(unit), 0, 1), geo, source, counts, unit)


def place_key(geo: Geometry, unit: int) -> tuple[int, int, int, int, int]:
    """Return frame pair, window row, window column, row, column: a sort key for window order."""
    pair, place = divmod(unit, geo.units)
    y, x = divmod(place, geo.width)
    return pair, y // geo.side, x // geo.side, y, x


def group_key(geo: Geometry, unit: int, scope: str) -> tuple[int, ...]:
    """Return a key for the frame pair or window that contains a unit."""
    return place_key(geo, unit)[: 1 if scope == "pair" else 3]


def groups_by_hand(rows: Rows, scope: str) -> list[tuple[list[int], dict[int, int]]]:
    """Return for each group its query rows, and the number of its units that each key row represents."""
    geo = rows.geometry
    groups: dict[tuple, tuple[list[int], dict[int, int]]] = {}
    for row, unit in enumerate(rows.unit.tolist()):
        groups.setdefault(group_key(geo, unit, scope), ([], {}))[0].append(row)
    for unit, row in enumerate(rows.unit_to_row.tolist()):
        key = group_key(geo, unit, scope)
        if row >= 0 and key in groups:
            counts = groups[key][1]
            counts[row] = counts.get(row, 0) + 1
    return [groups[key] for key in sorted(groups)]
