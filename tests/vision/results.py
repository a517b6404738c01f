"""Encoding in one call, and invariants of every result."""

from math import prod

import torch

from evoprune.methods import TowerShape
from evoprune.vision.encoder import Encoded, encode_rows
from tests.methods.tokens import plan_of
from tests.vision.clips import clip
from tests.vision.tower import random_patches, tiny_tower


def encode_patches(patches, grid, method, keep, visual=None, question=None, **how) -> Encoded:
    """Encode with the method's own plan. `patches`: one tensor, or pieces."""
    visual = visual or tiny_tower()
    pieces = [patches] if isinstance(patches, torch.Tensor) else patches
    plan = plan_of(method, TowerShape.of_tower(visual), grid, keep)
    return encode_rows(visual, pieces, plan, **how).select_tokens(question)


def encode_noise(grid, method, keep, full_layers=(1, 3), seed=0, **how) -> Encoded:
    return encode_patches(random_patches(grid, seed), grid, method, keep, tiny_tower(full_layers), **how)


def encode_clip(grid, changed, method, keep, seed=0, **how) -> Encoded:
    return encode_patches(clip(grid, changed, seed), grid, method, keep, **how)


def assert_same(a: Encoded, b: Encoded, atol: float = 2e-5) -> None:
    assert torch.equal(a.kept, b.kept)
    assert torch.equal(a.unit_to_row, b.unit_to_row)
    assert a.layers == b.layers and a.flat == b.flat
    torch.testing.assert_close(a.rows, b.rows, atol=atol, rtol=1e-5)
    torch.testing.assert_close(a.features, b.features, atol=atol, rtol=1e-5)


def check_result(encoded: Encoded, grid: tuple[int, int, int], whole_clip: bool = False) -> None:
    """Check the invariants of any method. Rows represent units of a single frame pair, unless `whole_clip`."""
    n = prod(grid)
    assert encoded.unit_to_row.shape == (n,) and encoded.grids == (grid,)
    assert ((encoded.unit_to_row >= 0) & (encoded.unit_to_row < len(encoded.rows))).all()
    assert encoded.unit_to_row.unique().numel() == len(encoded.rows)  # every row represents a unit
    assert (encoded.kept.diff() > 0).all()
    assert encoded.kept.min() >= 0 and encoded.kept.max() < n
    if encoded.size is None:  # otherwise tokens are means of clusters
        assert torch.equal(encoded.features, encoded.rows[encoded.unit_to_row[encoded.kept]])
    pair = torch.arange(n) // (grid[1] * grid[2])
    if not whole_clip:
        assert all(pair[encoded.unit_to_row == row].unique().numel() == 1 for row in range(len(encoded.rows)))
    assert encoded.kept_per_pair == torch.bincount(pair[encoded.kept], minlength=grid[0]).tolist()
