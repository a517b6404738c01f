"""Every part runs, at sizes that take milliseconds, and the layer that is measured is the tower's."""

import sys
from dataclasses import replace

import pytest
import torch

from evoprune.backend.cpu.quantize import check
from evoprune.methods.plans import full_plan
from evoprune.model.config import parse_config
from evoprune.session.loading.model import random_model
from evoprune.vision.encoder import encode
from evoprune.vision.families import merge_patches
from experiments.speed import kernels
from tests.threads import one_thread  # noqa: F401
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def sizes():
    config = parse_config(tiny_config().to_dict())
    return kernels.Sizes(config, product=(128, 256), copies=2, read_bytes=2**16, grid=(4, 8), grids=2, clip=3)


@pytest.fixture(scope="module")
def needs_bytes_and_bf16():
    try:
        check("int8", kernels.CPU)
    except kernels.UsageError:
        pytest.skip("no products of bytes here")
    if not kernels.can_pack(torch.empty(1, dtype=kernels.DTYPE)):
        pytest.skip("no products in bf16 here")


def test_the_command_prints_all_tables(monkeypatch, capsys, sizes, needs_bytes_and_bf16):
    monkeypatch.setattr(kernels, "Sizes", lambda config: sizes)
    monkeypatch.setattr(kernels, "matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(sys, "argv", ["kernels", "--repeat", "1"])
    kernels.main()
    out = capsys.readouterr().out
    tables = [block.splitlines() for block in out.split("\n\n") if block.startswith("|")]
    assert [len(table) - 2 for table in tables] == [6, 10, 6, 2]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert "100 GFLOP/s" in out and "GB/s" in out and "Error" not in out


def test_the_measured_layer_is_that_of_the_tower(sizes):
    """One layer of windows, seen through the merger."""
    config = replace(sizes.config.vision_config, depth=1, fullatt_block_indexes=())
    visual = random_model(replace(sizes.config, vision_config=config), torch.float32, kernels.CPU).model.visual
    units, weight = sizes.grid[0] * sizes.grid[1], visual.patch_embed.proj.weight.flatten(1)
    patches = torch.randn(units * 4, weight.shape[1])
    plan = full_plan(kernels.tower_shape(visual), (1, *sizes.grid))
    whole = encode(visual, [patches], plan).rows
    _, turn, (window, grid) = kernels.layer_inputs(visual, replace(sizes, grids=1))
    order = kernels.tower_geometry(visual, *sizes.grid).order
    x = (patches @ weight.T).view(units, 4, -1)[order]
    x = kernels.layer(visual.blocks[0], x, turn, config.num_heads, window)[order.argsort()]
    assert (window, grid) == (64, 128)
    torch.testing.assert_close(merge_patches(visual, x), whole)
