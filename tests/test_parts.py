"""Every part runs, at sizes that take milliseconds, and the layer that is measured is the tower's."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from evoprune import methods, parts
from evoprune.config import parse_config
from evoprune.dummy import random_model
from evoprune.quantize import check
from evoprune.vision.encoder import encode
from tests.threads import one_thread  # noqa: F401
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def sizes():
    config = parse_config(tiny_config().to_dict())
    return parts.Sizes(config, product=(128, 256), copies=2, read_bytes=2**16, grid=(4, 8), grids=2, clip=3)


@pytest.fixture(scope="module")
def needs_bytes_and_bf16():
    try:
        check("int8", parts.CPU)
    except parts.UsageError:
        pytest.skip("no products of bytes here")
    if not parts.can_pack(torch.empty(1, dtype=parts.DTYPE)):
        pytest.skip("no products in bf16 here")


def test_tables(monkeypatch, capsys, sizes, needs_bytes_and_bf16):
    monkeypatch.setattr(parts, "Sizes", lambda config: sizes)
    monkeypatch.setattr(parts, "matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(sys, "argv", ["parts", "--repeat", "1"])
    monkeypatch.setattr(parts, "measure", partial(parts.measure, backend="eager"))  # the compiler takes long
    parts.main()
    out = capsys.readouterr().out
    tables = [block.splitlines() for block in out.split("\n\n") if block.startswith("|")]
    assert [len(table) - 2 for table in tables] == [6, 10, 6, 2, 4]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert "100 GFLOP/s" in out and "GB/s" in out and "Error" not in out


def test_the_layer_is_the_towers(sizes):
    """One layer of windows, seen through a merger that only norms."""
    config = replace(sizes.config.vision_config, depth=1, fullatt_block_indexes=())
    visual = random_model(replace(sizes.config, vision_config=config), torch.float32, parts.CPU).model.visual
    visual.merger.mlp = torch.nn.Identity()
    units, weight = sizes.grid[0] * sizes.grid[1], visual.patch_embed.proj.weight.flatten(1)
    patches = torch.randn(units * 4, weight.shape[1])
    whole = encode(visual, [patches], (1, *sizes.grid), methods.get("none"), units).rows
    _, turn, (window, grid) = parts.layer_inputs(visual, replace(sizes, grids=1))
    order = parts.tower_geometry(visual, *sizes.grid).order
    x = (patches @ weight.T).view(units, 4, -1)[order]
    x = parts.layer(visual.blocks[0], x, turn, config.num_heads, window)[order.argsort()]
    assert (window, grid) == (64, 128)
    torch.testing.assert_close(parts.rms_norm(x, visual.merger.ln_q.weight).flatten(1), whole)
